"""Builds pyattr._C by running CMake, and maps triton_kernels/ to pyattr.triton_kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def generator(folder: Path, ninja: str | None) -> list[str]:
    """CMake's options for the tool that builds in a folder: Ninja where there is one, unless another began there.

    An isolated build's Ninja is gone afterwards, so the next one must name its own.
    """
    cache = folder / "CMakeCache.txt"
    began = cache.exists() and "CMAKE_GENERATOR:INTERNAL=Ninja" in cache.read_text(encoding="utf8")
    if ninja and (began or not cache.exists()):
        return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if began:  # there is no Ninja any more: begin again with what there is
        cache.unlink()
        shutil.rmtree(folder / "CMakeFiles")
    return []


class CMakeBuild(build_ext):
    """One CMake configure and build per extension; object files stay in build/ so that a rebuild is incremental."""

    def build_extension(self, ext):
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cuda = os.environ.get("PYATTR_CUDA", "auto")
        # One folder per setting: a CPU-only build never throws away the CUDA objects of another.
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-cuda-{cuda}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(folder),
            f"-DPYATTR_CUDA={cuda}",
            f"-DPYATTR_CUDA_ARCHITECTURES={os.environ.get('PYATTR_CUDA_ARCHITECTURES', 'all')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]  # fmt: skip
        configure += generator(folder, shutil.which("ninja"))
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(folder), "--parallel", jobs, "--target", "_C"], check=True)
        destination.mkdir(parents=True, exist_ok=True)
        built = folder / Path(self.get_ext_filename("_C")).name
        temporary = destination / f".{built.name}.part"
        shutil.copy2(built, temporary)
        os.replace(temporary, destination / built.name)  # a running process keeps the old file


if __name__ == "__main__":
    setup(
        packages=[*find_namespace_packages(include=["pyattr", "pyattr.*"]), "pyattr.triton_kernels"],
        package_dir={"pyattr.triton_kernels": "triton_kernels"},
        package_data={"pyattr.report.templates": ["*"]},
        ext_modules=[Extension("pyattr._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
