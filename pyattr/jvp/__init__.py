"""Forward mode with many tangents, through models as they are."""

from . import attention, constants, linear, norm, pointwise, views
from .forward import dual_forward

__all__ = ["dual_forward"]
