"""The environments of the peers, .venv-compat/<peer>: made once, and made again if they were left half made."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from .peer import Peer

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / ".venv-compat"


def wanted(peer: Peer) -> dict:
    """Everything that decides what is in the environment. The release of torch is that of the running environment."""
    torch = importlib.metadata.version("torch").split("+")[0]
    return {
        "python": sys.version.split()[0],
        "pyattr": str(ROOT / "pyattr"),
        "packages": [f"torch=={torch}", "pytest>=8", *peer.packages],
        "peer": peer.distribution if peer.installed else None,
    }


def install(name: str, peer: Peer) -> Path:
    """The interpreter of the peer's environment, which is made unless it is there and complete.

    The stamp is written last. The working tree's pyattr is linked into it, compiled extension and all: the extension knows
    neither torch nor NumPy, so any environment of the same Python loads it.
    """
    folder, parts = FOLDER / name, wanted(peer)
    python, stamp = folder / "bin" / "python", folder / "complete.json"
    try:
        if json.loads(stamp.read_text()) == parts:
            return python
    except (OSError, ValueError):
        pass
    print(f"making {folder.relative_to(ROOT)}: {', '.join(parts['packages'])}, {peer.distribution}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*pip, *parts["packages"]], check=True)
    if peer.installed:
        subprocess.run([*pip, "--no-deps", peer.distribution], check=True)
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    Path(site, "pyattr").symlink_to(ROOT / "pyattr", target_is_directory=True)
    temporary = stamp.with_suffix(".part")
    temporary.write_text(json.dumps(parts))
    os.replace(temporary, stamp)
    return python


def check(python: Path) -> None:
    """Our kernels, not the reference alone, must be what the tests run."""
    probe = "from pyattr import backends; module = backends.extension(); assert not isinstance(module, str), module"
    subprocess.run([str(python), "-c", probe], check=True, cwd=FOLDER)
