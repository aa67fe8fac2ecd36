"""Training-data attribution for diffusion models: fast kernels and complete algorithms."""

from importlib.metadata import PackageNotFoundError, version

from . import threads as threads  # it watches for forks from now on

try:
    __version__ = version("pyattr")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
