"""Training-data attribution for diffusion models: fast kernels and complete algorithms."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pyattr")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
