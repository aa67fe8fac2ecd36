"""Forward mode with many tangents, through models as they are."""

from . import attention as attention  # these register their rules
from . import constants as constants
from . import linear as linear
from . import norm as norm
from . import pointwise as pointwise
from . import recurrent as recurrent
from . import values as values
from . import views as views
from .forward import dual_forward

__all__ = ["dual_forward"]
