"""Builds pyattr._C by running CMake, and maps triton_kernels/ to pyattr.triton_kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


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
        if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja"]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(folder), "--parallel", jobs, "--target", "_C"], check=True)
        destination.mkdir(parents=True, exist_ok=True)
        built = folder / Path(self.get_ext_filename("_C")).name
        temporary = destination / f".{built.name}.part"
        shutil.copy2(built, temporary)
        os.replace(temporary, destination / built.name)  # a running process keeps the old file


setup(
    packages=[*find_namespace_packages(include=["pyattr", "pyattr.*"]), "pyattr.triton_kernels"],
    package_dir={"pyattr.triton_kernels": "triton_kernels"},
    package_data={"pyattr.report.templates": ["*"]},
    ext_modules=[Extension("pyattr._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
