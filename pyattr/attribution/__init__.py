"""Attribution methods: ``fit(train)`` returns self, ``scores(queries)`` returns [Q, N], positive = proponent."""

from . import codes
from .dtrak import DTRAK
from .encoded import EncodedEnsemble
from .nda import NDA
from .patch_matches import Explanation, Match
from .patch_tuning import Tuning
from .queries import QUERY_IDS
from .similarity import RawPixel
from .trak import TRAK

__all__ = [
    "DTRAK",
    "NDA",
    "QUERY_IDS",
    "TRAK",
    "EncodedEnsemble",
    "Explanation",
    "Match",
    "RawPixel",
    "Tuning",
    "codes",
]
