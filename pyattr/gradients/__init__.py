"""Per-sample gradients of any module, whole or streamed into a projection."""

from .fallback import FallbackWarning
from .per_sample import per_sample_gradients
from .project import KINDS, least_memory, project_gradients

__all__ = ["KINDS", "FallbackWarning", "least_memory", "per_sample_gradients", "project_gradients"]
