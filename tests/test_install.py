"""What gets installed, and what works without the rest: wheel, editable install, plain CMake, missing parts."""

import filecmp
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# cmake and ninja come as Python packages; they lie beside the interpreter.
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
NVCC = shutil.which("nvcc")


def run(*command, cwd, environment=None, check=True):
    """Run a command with only the repository's variables changed; its two outputs together as text."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("PYATTR_", "PYTHON"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**settings, "PATH": TOOLS, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done if not check else done.stdout


def cached(folder: Path, name: str) -> str:
    """The value of a variable in a build folder's cache."""
    [value] = re.findall(rf"^{name}:\w+=(.*)$", (folder / "CMakeCache.txt").read_text(encoding="utf8"), re.MULTILINE)
    return value


@pytest.fixture(scope="module")
def build_folder() -> Path:
    """Where CMake compiled the extension that these tests import, or else where it will for the CPU alone.

    A build with its settings compiles what changed since, and mostly that is nothing.
    """
    folders = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-cuda-"
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    installed = ROOT / "pyattr" / name
    for built in folders.parent.glob(f"{folders.name}*/{name}"):
        if installed.exists() and filecmp.cmp(built, installed):
            return built.parent
    return folders.with_name(f"{folders.name}off")


@pytest.fixture(scope="module")
def wheel(build_folder, tmp_path_factory) -> Path:
    """A wheel of this tree. Objects are cached in build/; what setuptools collects is not, it could be stale."""
    settings = {"PYATTR_CUDA": "off"}
    if build_folder.exists():
        settings = {key: cached(build_folder, key) for key in ("PYATTR_CUDA", "PYATTR_CUDA_ARCHITECTURES")}
    folder = tmp_path_factory.mktemp("wheel")
    collected = folder / "setup.cfg"
    collected.write_text(f"[build]\nbuild_base={folder / 'build'}\n[egg_info]\negg_base={folder}\n")
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, ROOT,
        cwd=folder,
        environment={**settings, "DIST_EXTRA_CONFIG": str(collected)},
    )  # fmt: skip
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment that holds the wheel, and sees this one's torch but not its editable pyattr."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    # A .pth file's folder comes after the environment's own packages, and the .pth files in it (an editable install's hook
    # is one) are not run.
    [site] = folder.glob("lib/python*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"])
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    return python


# triton_kernels: ours is pyattr.triton_kernels and nothing else, since Triton ships a package of the bare name.

OURS = "import pyattr.triton_kernels as t; print(t.__name__, t.__file__)"


def test_wheel_elsewhere_has_our_kernels_under_our_name_only(installed, tmp_path):
    printed = run(installed, "-c", OURS, cwd=tmp_path)
    assert printed.startswith("pyattr.triton_kernels ")
    assert str(installed.parent.parent) in printed
    found = run(installed, "-c", "from importlib.util import find_spec as f; print(f('triton_kernels'))", cwd=tmp_path)
    assert str(installed.parent.parent) not in found and str(ROOT) not in found


def test_wheel_in_the_repository_root_is_shadowed_by_the_sources(installed):
    """Why wheels are tested from another folder: here the local pyattr/ is found first, and it has no triton_kernels/."""
    done = run(installed, "-c", OURS, cwd=ROOT, check=False)
    assert done.returncode != 0 and "No module named 'pyattr.triton_kernels'" in done.stdout
    configured = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    assert "--import-mode=importlib" in configured


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_editable_install_finds_our_kernels(where, tmp_path):
    printed = run(sys.executable, "-c", OURS, cwd=ROOT if where == "root" else tmp_path)
    assert printed.split() == ["pyattr.triton_kernels", str(ROOT / "triton_kernels" / "__init__.py")]


def test_the_bare_name_fails_loudly_in_the_repository_root():
    done = run(sys.executable, "-c", "import triton_kernels", cwd=ROOT, check=False)
    assert done.returncode != 0
    assert "ImportError" in done.stdout and "pyattr.triton_kernels" in done.stdout


# The wheel's content and use.


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"pyattr"}
    assert len([name for name in names if re.fullmatch(r"pyattr/_C\.[^/]*\.(so|pyd)", name)]) == 1
    sources = {f"pyattr/{path.relative_to(ROOT / 'pyattr')}" for path in (ROOT / "pyattr").rglob("*.py")}
    sources |= {f"pyattr/triton_kernels/{path.name}" for path in (ROOT / "triton_kernels").glob("*.py")}
    templates = {f"pyattr/report/templates/{path.name}" for path in (ROOT / "pyattr/report/templates").glob("*")}
    assert sources | templates <= set(names)
    # Nothing stale either: every Python file in the wheel is a file of this tree.
    assert {name for name in names if name.endswith(".py")} == sources


PROJECT = """
import pyattr, torch
from pyattr.ops import rademacher_project, sign_matrix
x = torch.arange(600.).reshape(2, 300) % 7 - 3
wanted = x @ sign_matrix(range(5), range(300), 1, 2).T
assert torch.equal(rademacher_project(x, 5, seed=1, stream=2, backend={backend!r}), wanted)
print(pyattr.__file__)
"""


def test_wheel_projects_from_another_folder(installed, tmp_path):
    printed = run(installed, "-c", PROJECT.format(backend="cpu"), cwd=tmp_path)
    assert str(installed.parent.parent) in printed


def test_wheel_has_the_command(installed, tmp_path):
    printed = run(installed.parent / "pyattr", "info", cwd=tmp_path)
    assert usable(printed, "cpu")


# The environment that make builds.


def usable(printed: str, backend: str) -> bool:
    """Whether `info` says that a backend is usable for every op: one such line for each op."""
    from pyattr import backends

    return len(re.findall(rf"\b{backend}\b[^\n]*\busable\b", printed)) == len(backends.report())


def test_info_in_the_repository_root_shows_the_cpu_backend_usable():
    printed = run(sys.executable, "-m", "pyattr", "info", cwd=ROOT)
    assert usable(printed, "cpu") and usable(printed, "reference")


# Without a GPU, without Triton, without the compiled module: everything imports, and runs on what is there.

HIDE = """
import importlib.machinery, sys

class Without:
    '''A finder that does not see some modules, in front of each finder that would.'''
    def __init__(self, finder, names):
        self.finder, self.names = finder, names
    def find_spec(self, name, path=None, target=None):
        hidden = any(name == n or name.startswith(n + ".") for n in self.names)
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder, {names!r}) for finder in sys.meta_path]
"""
WITHOUT_IT = """
import pyattr.arrays, pyattr.attribution, pyattr.cli, pyattr.diffusion, pyattr.gradients, pyattr.reference, pyattr.report
import pyattr.testing
from pyattr.backends import BackendError
try:
    rademacher_project(x, 5, backend={backend!r})
except BackendError as error:
    print("refused:", error)
sys.argv = ["pyattr", "info"]
pyattr.cli.main()
"""


@pytest.mark.parametrize(
    ("names", "backend", "reason"),
    [
        (["triton"], "triton", "install pyattr[gpu]"),
        (["pyattr._C"], "cpu", "pyattr._C is not built"),
        (["pyattr._C", "triton", "cupy"], "cuda", "pyattr._C is not built"),
    ],
)
def test_missing_parts_are_reasons_and_not_errors(names, backend, reason, tmp_path):
    program = HIDE.format(names=names) + PROJECT.format(backend=None) + WITHOUT_IT.format(backend=backend)
    printed = run(sys.executable, "-c", program, cwd=tmp_path, environment={"COLUMNS": "200"})
    refusal, shown = printed[printed.index("refused:") :].split("\n", 1)
    assert reason in refusal and reason in shown
    assert usable(shown, "reference") and not usable(shown, backend)


def test_without_a_gpu_the_cuda_backend_says_so(tmp_path):
    done = run(
        sys.executable,
        "-c",
        PROJECT.format(backend="cuda"),
        cwd=tmp_path,
        environment={"CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode != 0 and "BackendError" in done.stdout
    assert "torch sees no CUDA device" in done.stdout or "built without CUDA" in done.stdout


# CMake without setuptools.


@pytest.fixture(scope="module")
def plain_build(build_folder, wheel) -> Path:
    """The wheel's build folder, its module made anew by CMake alone."""
    [built] = build_folder.glob("_C.*")
    built.unlink()
    run("cmake", "-S", ROOT, "-B", build_folder, cwd=build_folder)
    run("cmake", "--build", build_folder, "--parallel", "2", cwd=build_folder)
    return build_folder


def test_plain_cmake_builds_a_module_that_loads(plain_build, tmp_path):
    load = (
        f"import sys; sys.path.insert(0, {str(plain_build)!r}); import _C; print(_C.simd_levels(), _C.built_with_cuda)"
    )
    printed = run(sys.executable, "-c", load, cwd=tmp_path)
    assert "'scalar'" in printed
    assert printed.split()[-1] == str(any(plain_build.rglob("*.cu.o")))


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm on PATH")
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_files_of_a_simd_level_define_their_entry_alone(level, plain_build, tmp_path):
    """A weak function in them, compiled for this level, could be the copy that the linker keeps for every level."""
    found = sorted(plain_build.rglob(f"*_{level}.cpp.o"))
    assert len(found) == len(list((ROOT / "csrc" / "cpu").glob(f"*_{level}.cpp")))
    for path in found:
        lines = [
            line.split(maxsplit=2)[1:] for line in run("nm", "--defined-only", "-C", path, cwd=tmp_path).splitlines()
        ]
        shared = [name for kind, name in lines if kind.isupper() or kind in "uvw"]  # lower case is this file's own
        shared = [name for name in shared if not name.startswith("DW.ref.")]  # an address for the unwinder, no code
        entries = [name for name in shared if re.fullmatch(rf"pyattr::cpu::\w+_{level}\(.*\)", name)]
        assert entries and shared == entries


def path_without_nvcc(folder: Path) -> str:
    """PATH with every folder that holds nvcc replaced by links to the rest of it."""
    kept = []
    for number, entry in enumerate(TOOLS.split(os.pathsep)):
        if not Path(entry, "nvcc").exists():
            kept.append(entry)
            continue
        links = folder / f"path{number}"
        links.mkdir()
        for tool in Path(entry).iterdir():
            if tool.name != "nvcc":
                (links / tool.name).symlink_to(tool)
        kept.append(str(links))
    return os.pathsep.join(kept)


@pytest.mark.parametrize(("setting", "fails"), [("on", True), ("auto", False), ("maybe", True)])
def test_cuda_setting_without_nvcc(setting, fails, tmp_path):
    environment = {"PATH": path_without_nvcc(tmp_path), "CUDACXX": "", "CUDA_PATH": ""}
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", f"-DPYATTR_CUDA={setting}"]
    done = run(*command, f"-DPython_EXECUTABLE={sys.executable}", cwd=tmp_path, environment=environment, check=False)
    said = " ".join(done.stdout.split())
    if setting == "on":
        assert "PYATTR_CUDA=on, but no CUDA compiler was found" in said
    elif setting == "maybe":
        assert "PYATTR_CUDA must be auto, on or off, got 'maybe'" in said
    else:
        assert "pyattr: CUDA kernels OFF" in said
    assert (done.returncode != 0) == fails


@pytest.mark.parametrize(
    ("version", "architectures"),
    [
        ("11.8", ""),
        ("12.0", "80;86-real;89-real;90a-real"),
        ("12.6.3", "80;86-real;89-real;90a-real"),
        ("12.8", "80;86-real;89-real;90a-real;120"),
        ("13.0", "80;86-real;89-real;90a-real;120"),
    ],
)
def test_architectures_are_those_that_nvcc_knows(version, architectures, tmp_path):
    script = tmp_path / "script.cmake"
    script.write_text(
        f'include("{ROOT}/csrc/cuda/architectures.cmake")\npyattr_cuda_architectures({version} found)\n'
        'message(STATUS "found <${found}>")\n'
    )
    assert f"found <{architectures}>" in run("cmake", "-P", script, cwd=tmp_path)


@pytest.mark.skipif(not NVCC, reason="no nvcc on PATH")
@pytest.mark.parametrize(("setting", "fails"), [("on", True), ("auto", False)])
def test_cuda_setting_with_an_old_nvcc(setting, fails, tmp_path):
    old = tmp_path / "nvcc"
    old.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release 11.8" || exec {NVCC} "$@"\n'
    )
    old.chmod(0o755)
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", f"-DPYATTR_CUDA={setting}"]
    command.append(f"-DPython_EXECUTABLE={sys.executable}")
    done = run(*command, cwd=tmp_path, environment={"CUDACXX": str(old)}, check=False)
    said = " ".join(done.stdout.split())
    assert "is of CUDA 11.8, 12.0 is the oldest that will do" in said
    assert ("pyattr: CUDA kernels OFF" in said) != fails and (done.returncode != 0) == fails


# Isolated builds: pip makes a new environment for each, and throws it away.


def load_setup():
    spec = importlib.util.spec_from_file_location("setup_of_pyattr", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_build_goes_on_with_another_ninja_or_none(tmp_path):
    generator = load_setup().generator
    ninja = shutil.which("ninja", path=TOOLS)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(x NONE)\nadd_custom_target(all_of_it ALL)\n"
    )
    for number in range(2):
        environment = tmp_path / f"environment{number}"
        environment.mkdir()
        options = generator(tmp_path / "build", shutil.copy(ninja, environment / "ninja"))
        run("cmake", "-S", tmp_path, "-B", tmp_path / "build", *options, cwd=tmp_path)
        run("cmake", "--build", tmp_path / "build", cwd=tmp_path)
        shutil.rmtree(environment)
    assert generator(tmp_path / "build", None) == []
    assert not (tmp_path / "build" / "CMakeCache.txt").exists()
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", "-G", "Unix Makefiles", cwd=tmp_path)
    assert generator(tmp_path / "build", ninja) == []  # what make began, make ends


def test_a_pybind11_that_is_gone_is_looked_for_again(tmp_path):
    command = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        tmp_path / "build",
        "-DPYATTR_CUDA=off",
        f"-Dpybind11_DIR={tmp_path / 'gone'}",
    ]
    run(*command, f"-DPython_EXECUTABLE={sys.executable}", cwd=tmp_path)
