"""The peers' own environment: ``python -m bench.peers`` makes .venv-peers, which holds what cannot live beside ours.

traker and dattri are run with NumPy 1, and bergson declares packages that its projection never uses, so all three are
installed without their dependencies, and what they do import is named here.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import torch

from .machine import ROOT

FOLDER = ROOT / ".venv-peers"
PEERS = ["traker==0.3.2", "dattri==0.3.0", "bergson==2.5.1"]
IMPORTED = [
    f"torch=={torch.__version__.split('+')[0]}",
    "numpy<2",
    "scipy",
    "pyyaml",
    "tqdm",
    # imported by bergson's collector, where project_global lives; the caps are the last releases that run with NumPy 1
    "transformers>=5,<6",
    "peft>=0.17",
    "datasets<4",
    "pyarrow<20",
    "pandas<3",
    "jaxtyping>=0.3.3",
    "ml_dtypes",
    "natsort",
    "simple-parsing",
    "petname",
]


def python() -> Path:
    """The interpreter inside the environment."""
    return FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _stamp() -> Path:
    return FOLDER / "complete.json"


def _wanted() -> dict:
    return {"python": sys.version.split()[0], "packages": [*IMPORTED, *PEERS]}


def missing() -> str | None:
    """Why the peers cannot run, or None."""
    try:
        complete = json.loads(_stamp().read_text()) == _wanted()
    except (OSError, ValueError):
        complete = False
    return None if complete else "the peers' environment is not there: run `python -m bench.peers`"


def install() -> None:
    """Make the environment unless it is there and complete; the stamp is written last, so half an install is made again."""
    if missing() is None:
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    venv.create(FOLDER, with_pip=True)
    pip = [str(python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *IMPORTED], check=True)
    subprocess.run([*pip, "--no-deps", *PEERS], check=True)
    temporary = _stamp().with_suffix(".part")
    temporary.write_text(json.dumps(_wanted()))
    os.replace(temporary, _stamp())


if __name__ == "__main__":
    install()
    print(f"peers are ready in {FOLDER}")
