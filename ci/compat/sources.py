"""The peers' own tests: fetched from their source distributions at run time, and turned to our stand-ins."""

import ast
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from .environment import FOLDER
from .peer import Adapted, Peer

PATCHES = Path(__file__).resolve().parent / "patches"


def fetch(distribution: str) -> Path:
    """The folder of the unpacked source distribution, fetched once."""
    archives = FOLDER / "sdists" / distribution.replace("==", "-")
    if not list(archives.glob("*.tar.gz")):
        # pip prepares the metadata of what it downloads; setuptools is in the environment that builds pyattr.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        options = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, *options, "--dest", str(archives), distribution], check=True)
    [archive] = archives.glob("*.tar.gz")
    unpacked = archives / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    [folder] = unpacked.iterdir()
    return folder


def edited(text: str, test: Adapted) -> str:
    """The file's text with its edits made; an edit or a test left out that does not fit the text is an error."""
    names = defined(text)
    for name in test.left_out:
        if name not in names:
            raise ValueError(f"{test.path} has no test {name}")
    for found, put in test.edits:
        if found not in text:
            raise ValueError(f"{test.path} does not contain {found!r}")
        text = text.replace(found, put)
    return text


def defined(text: str) -> set[str]:
    """The functions of a file, those of a class as "Class.function"."""
    tree = ast.parse(text)
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def adapt(name: str, peer: Peer) -> Path:
    """A folder with the adapted tests, and our patches as their conftest."""
    source, folder = fetch(peer.distribution), FOLDER / "adapted" / name
    shutil.rmtree(folder, ignore_errors=True)
    for test in peer.tests:
        target = folder / test.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(edited((source / test.path).read_text(encoding="utf8"), test), encoding="utf8")
    patches = PATCHES / f"{name}.py"
    if patches.exists():
        shutil.copy(patches, folder / "conftest.py")
    return folder
