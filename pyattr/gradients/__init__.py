"""Per-sample gradients of any module, whole, streamed into a projection, or their norms."""

from .fallback import FallbackWarning
from .gradient_norms import gradient_norms
from .per_sample import per_sample_gradients
from .project import KINDS, least_memory, project_gradients

__all__ = ["KINDS", "FallbackWarning", "gradient_norms", "least_memory", "per_sample_gradients", "project_gradients"]
