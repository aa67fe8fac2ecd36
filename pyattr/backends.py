"""Which implementation of an op runs: every backend declares what it can do, and a refusal lists its reasons.

``backend=None`` takes the first usable of cuda, triton, cpu, reference; a backend asked for by name never falls back.
``PYATTR_BACKEND`` replaces None for the whole process, ``PYATTR_SIMD`` (scalar, avx2, avx512) sets the CPU level; one that the
processor lacks is refused by name, never left for the reference to make up for.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

NAMES = ("cuda", "triton", "cpu", "reference")  # the order of choice

_REGISTRY: dict[str, tuple["Backend", ...]] = {}


class BackendError(RuntimeError):
    """No backend can run an op on the given inputs, or the one asked for cannot."""


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        name: one of :data:`NAMES`.
        run: the implementation; takes what the op passes to :func:`choose`'s result.
        unavailable: reasons why it cannot run on this machine at all; empty when it can.
        unsupported: reasons why it cannot run on these inputs; same arguments as ``run``.
    """

    name: str
    run: Callable
    unavailable: Callable[[], list[str]]
    unsupported: Callable[..., list[str]]


def register(op: str, backends: Sequence[Backend]) -> None:
    """Declare the backends of an op; they are kept in the order of :data:`NAMES`."""
    _REGISTRY[op] = tuple(sorted(backends, key=lambda b: NAMES.index(b.name)))


def check_name(op: str, source: str, name: str | None) -> None:
    """Refuse what is not a backend's name, nor None.

    Raises:
        ValueError: the message names ``source``, the argument or variable that it came from.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"{op}: {source} must be one of {', '.join(NAMES)}, got {name!r}")


def choose(op: str, requested: str | None, *args, **kwargs) -> Backend:
    """The backend that runs ``op`` on these arguments.

    Raises:
        ValueError: ``requested`` (or PYATTR_BACKEND) is not a backend's name.
        BackendError: it cannot run these inputs, or none can; the message lists every reason.
    """
    source = "backend"
    if requested is None and os.environ.get("PYATTR_BACKEND"):
        requested, source = os.environ["PYATTR_BACKEND"], "PYATTR_BACKEND"
    check_name(op, source, requested)
    if requested not in (None, *(backend.name for backend in _REGISTRY[op])):
        raise BackendError(f"{op}: {source}={requested!r} cannot run, the op has no such backend")
    refusals = []
    for backend in _REGISTRY[op]:
        if requested not in (None, backend.name):
            continue
        if backend.name == "cpu" and requested is None and simd_refusal():
            raise BackendError(f"{op}: {simd_refusal()}")
        reasons = backend.unavailable() or backend.unsupported(*args, **kwargs)
        if not reasons and requested is None and backend.name == "triton" and triton_interpreted():
            reasons = ["Triton's interpreter (TRITON_INTERPRET=1) runs only when asked for by name"]
        if not reasons:
            return backend
        refusals.append(f"{backend.name}: {'; '.join(reasons)}")
    wanted = "no backend can" if requested is None else f"{source}={requested!r} cannot"
    raise BackendError(f"{op}: {wanted} run on these inputs. " + ". ".join(refusals))


def report() -> dict[str, dict[str, list[str]]]:
    """For every op and backend, the reasons why it cannot run on this machine; an empty list means usable."""
    from . import ops  # noqa: F401  (importing the ops registers them)

    return {op: {b.name: b.unavailable() for b in backends} for op, backends in sorted(_REGISTRY.items())}


@functools.cache
def extension():
    """The compiled module ``pyattr._C``, or the reason (a string) why there is none.

    Only its absence is a reason; a module that is there and fails to load raises, since that is a broken build.
    """
    try:
        return importlib.import_module("pyattr._C")
    except ModuleNotFoundError as error:
        if error.name != "pyattr._C":
            raise
        return "pyattr._C is not built: run `pip install .` from the source tree with a C++17 compiler"


@functools.cache
def simd_refusal() -> str:
    """What is wrong with PYATTR_SIMD, which is read once per process; "" where nothing is."""
    module = extension()
    if isinstance(module, str):
        return ""
    try:
        module.simd_level()
    except RuntimeError as error:
        return str(error)
    return ""


def cpu_unavailable(symbol: str) -> Callable[[], list[str]]:
    """Reasons of a C++ CPU kernel."""

    def reasons():
        module = extension()
        if isinstance(module, str):
            return [module]
        found = [simd_refusal()] if simd_refusal() else []
        return found if hasattr(module, symbol) else [f"pyattr._C has no {symbol}: rebuild it with `pip install .`"]

    return reasons


def cuda_unavailable(symbol: str) -> Callable[[], list[str]]:
    """Reasons of a CUDA kernel."""

    def reasons():
        module = extension()
        if isinstance(module, str):
            return [module]
        found = []
        if not hasattr(module, symbol):
            found.append("pyattr._C was built without CUDA: reinstall with PYATTR_CUDA=on and nvcc on PATH")
        if not torch.cuda.is_available():
            found.append("torch sees no CUDA device")
        return found

    return reasons


def capability_unsupported(device: torch.device) -> list[str]:
    """Reasons of a kernel that needs the tensor cores of compute capability 8.0, on tensors of a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability(device)
    return [] if major >= 8 else [f"needs compute capability 8.0, {device} has {major}.{minor}"]


def made_of(name: str, *ops: str) -> Callable[[], list[str]]:
    """Reasons of an op that is made of other ops' backends of this name."""

    def reasons():
        found = [reason for op in ops for b in _REGISTRY[op] if b.name == name for reason in b.unavailable()]
        return list(dict.fromkeys(found))

    return reasons


def placement_unsupported(name: str, **tensors: torch.Tensor) -> list[str]:
    """Reasons of a kernel for 16- and 32-bit floats on its own kind of device."""
    wanted = "cuda" if name == "cuda" or (name == "triton" and not triton_interpreted()) else "cpu"
    reasons = []
    for argument, tensor in tensors.items():
        if tensor.device.type != wanted:
            reasons.append(f"{argument} is on {tensor.device}, this backend needs {wanted}")
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            reasons.append(f"{argument} is {tensor.dtype}, this backend takes float16, bfloat16 and float32")
    return reasons + capability_unsupported(next(iter(tensors.values())).device)


def triton_interpreted() -> bool:
    """Whether Triton was asked to interpret its kernels, which runs them on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_missing() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed: install pyattr[gpu]"]
    return []


def triton_unavailable() -> list[str]:
    """Reasons of any Triton kernel."""
    if _triton_missing():
        return _triton_missing()
    if not triton_interpreted() and not torch.cuda.is_available():
        return ["torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"]
    return []


def always() -> list[str]:
    """No reasons: the reference runs everywhere."""
    return []


def environment() -> dict[str, str]:
    """Versions, SIMD level, threads and GPU, as ``python -m pyattr info`` prints them."""
    from . import __version__

    module = extension()
    built = not isinstance(module, str)
    if built:
        level = simd_refusal() or f"{module.simd_level()} (of {', '.join(module.simd_levels())})"
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    versions = {}
    for name in ("numpy", "triton", "diffusers", "cupy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "pyattr": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "extension": f"built {'with' if module.built_with_cuda else 'without'} CUDA" if built else module,
        "SIMD level": level if built else "none",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
        "GPU": ", ".join(gpus) or "none",
    }
