"""One op, one name, every layer: for each pyattr/ops/<op>.py the sibling files exist, are bound and are exported."""

import ast
import importlib
from pathlib import Path

import pytest

from pyattr import backends, ops

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(path.stem for path in (ROOT / "pyattr" / "ops").glob("*.py") if not path.stem.startswith("_"))
# Made of library calls (a matmul that forms a tile, a gather) and the kernels of the other ops: no source of their own.
COMPOSED = {"conv2d_grad_project", "kron_grad_project", "linear_grad_project", "mask_project", "multisketch_project"}
COMPILED = [op for op in OPS if op not in COMPOSED]
SIBLINGS = (
    "csrc/{}.h",
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "csrc/bind/{}.cpp",
    "csrc/bind/{}_cuda.cpp",
    "triton_kernels/{}.py",
    "pyattr/ops/{}.py",
    "pyattr/reference/{}.py",
    "tests/ops/test_{}.py",
    "bench/bench_{}.py",
)
# Imports go one way only: a module may import from lower layers and from its own.
LAYERS = {
    "arrays": 0, "files": 0, "datasets": 0, "threads": 0, "_C": 0, "triton_kernels": 0, "reference": 0,
    "backends": 1, "ops": 2, "testing": 3,
    "gradients": 4, "jvp": 4, "diffusion": 4,
    "attribution": 5, "compat": 5, "evaluation": 5, "search": 5,
    "report": 6, "cli": 7,
}  # fmt: skip


def functions(path: Path) -> set[str]:
    return {
        node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))) if isinstance(node, ast.FunctionDef)
    }


def test_there_are_ops():
    assert {"rademacher_project", "gaussian_project"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sibling", SIBLINGS)
def test_sibling_exists(op, sibling):
    own_source = sibling.startswith(("csrc", "triton_kernels"))
    assert (ROOT / sibling.format(op)).is_file() == (op in COMPILED or not own_source)


@pytest.mark.parametrize("pattern", ["csrc/*.h", "csrc/cuda/*.cu"])
def test_no_layer_has_an_op_of_its_own(pattern):
    """A header or kernel without an op of its name is a slip; what two ops share lies in csrc/common or in a .cuh."""
    assert {path.stem for path in ROOT.glob(pattern)} - set(OPS) == set()


@pytest.mark.parametrize("op", OPS)
def test_exported(op):
    assert op in ops.__all__
    assert callable(getattr(ops, op))
    assert callable(getattr(importlib.import_module(f"pyattr.reference.{op}"), op))
    assert op in functions(ROOT / "pyattr" / "ops" / f"{op}.py")


@pytest.mark.parametrize("op", COMPILED)
def test_bound(op):
    calls = (ROOT / "csrc" / "module.cpp").read_text(encoding="utf8")
    assert f"bind_{op}(m);" in calls
    assert f"bind_{op}_cuda(m);" in calls
    module = backends.extension()
    if isinstance(module, str):
        pytest.skip(module)
    assert hasattr(module, f"{op}_cpu")
    assert hasattr(module, f"{op}_cuda") == module.built_with_cuda


@pytest.mark.parametrize("op", COMPILED)
def test_triton_kernel_and_its_launcher(op):
    assert {op, f"{op}_kernel"} <= functions(ROOT / "triton_kernels" / f"{op}.py")


@pytest.mark.parametrize("op", OPS)
def test_every_backend_is_declared(op):
    lacking = {"mask_project": "triton"}.get(op)  # one gather is all it does, and torch's runs on the same device
    assert list(backends.report()[op]) == [name for name in backends.NAMES if name != lacking]


def imported_parts(path: Path) -> set[str]:
    """The parts of pyattr (first component below it) that a file imports, wherever in the file."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]  # ("pyattr", "ops") for pyattr/ops/x.py
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        found |= {name[1] for name in names if name[0] == "pyattr" and len(name) > 1}
    return found & set(LAYERS)


ENTRIES = {ROOT / "pyattr" / "__init__.py", ROOT / "pyattr" / "__main__.py"}
PARTS = sorted(set((ROOT / "pyattr").rglob("*.py")) - ENTRIES)


@pytest.mark.parametrize("path", PARTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    part = path.relative_to(ROOT / "pyattr").parts[0].removesuffix(".py")
    assert part in LAYERS, f"give {part} a layer in {Path(__file__).name}"
    # backends.report() has to import the ops, which register themselves with it.
    allowed = {"ops"} if part == "backends" else set()
    too_high = {name for name in imported_parts(path) if LAYERS[name] > LAYERS[part]} - allowed
    assert too_high == set(), f"{part} (layer {LAYERS[part]}) imports {too_high}"
