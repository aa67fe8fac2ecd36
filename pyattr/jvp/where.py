"""Which part of the module is running: for error messages only."""

import sys

from torch import nn


def here(run) -> str:
    """' in NAME (CLASS)' of the innermost module that is now in its forward, '' where there is none."""
    if not isinstance(run.root, nn.Module):
        return ""
    names = {id(part): name for name, part in run.root.named_modules()}
    frame = sys._getframe(1)
    while frame is not None:
        part = frame.f_locals.get("self")
        if id(part) in names and isinstance(part, nn.Module):
            return f" in {names[id(part)] or 'the module'} ({type(part).__name__})"
        frame = frame.f_back
    return ""
