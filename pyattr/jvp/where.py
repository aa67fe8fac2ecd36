"""Which part of the module is running, and refusals that name it."""

import sys

import torch
from torch import nn


class Refusal(NotImplementedError):
    """What cannot be followed operator by operator, though torch.func.jvp of a module around it may do it.

    Attributes:
        modules: those that are in their call, the innermost first.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.modules = _calls()


def _frames():
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _calls() -> list[nn.Module]:
    code = nn.Module._call_impl.__code__
    return list(dict.fromkeys(frame.f_locals["self"] for frame in _frames() if frame.f_code is code))


def here(run) -> str:
    """' in NAME (CLASS)' of the innermost module that is now in its forward, '' where there is none."""
    if not isinstance(run.root, nn.Module):
        return ""
    names = {id(part): name for name, part in run.root.named_modules()}
    for frame in _frames():
        part = frame.f_locals.get("self")
        if id(part) in names and isinstance(part, nn.Module):
            return f" in {title(run.root, part)}"
    return ""


def title(root, part) -> str:
    """'NAME (CLASS)' of a part of the module, 'the function' of what is none."""
    if not isinstance(part, nn.Module):
        return "the function"
    names = (name for name, one in root.named_modules() if one is part) if isinstance(root, nn.Module) else iter(())
    name = next(names, None)
    return type(part).__name__ if name is None else f"{name or 'the module'} ({type(part).__name__})"


def current_function() -> type | None:
    """The innermost torch.autograd.Function that is in its forward; those that only save memory do not count."""
    code = torch.autograd.Function.apply.__func__.__code__
    for frame in _frames():
        if frame.f_code is code and frame.f_locals["cls"].__module__ != "torch.utils.checkpoint":
            return frame.f_locals["cls"]
    return None


def has_own_jvp(function: type | None) -> bool:
    return function is not None and function.jvp is not torch.autograd.Function.jvp
