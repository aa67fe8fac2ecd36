"""Attribution methods: ``fit(train)`` returns self, ``scores(queries)`` returns [Q, N], positive = proponent."""

from . import codes
from .das import DAS
from .dtrak import DTRAK
from .encoded import EncodedEnsemble
from .ensembles import Ensemble
from .gradient_similarity import GAS, GradientCosine, GradientDot, TracInCP
from .influence import RelativeInfluence, RenormalizedInfluence
from .journey import JourneyTRAK
from .magic import MAGIC
from .nda import NDA
from .patch_matches import Explanation, Match
from .patch_tuning import Tuning
from .probed_das import ProbedDAS
from .queries import QUERY_IDS
from .readouts import READOUTS, Readout, readout
from .retraining import Datamodel, EmpiricalInfluence
from .similarity import CLIPSimilarity, RawPixel
from .trak import TRAK

__all__ = [
    "DAS",
    "DTRAK",
    "GAS",
    "MAGIC",
    "NDA",
    "QUERY_IDS",
    "READOUTS",
    "TRAK",
    "CLIPSimilarity",
    "Datamodel",
    "EmpiricalInfluence",
    "EncodedEnsemble",
    "Ensemble",
    "Explanation",
    "GradientCosine",
    "GradientDot",
    "JourneyTRAK",
    "Match",
    "ProbedDAS",
    "RawPixel",
    "Readout",
    "RelativeInfluence",
    "RenormalizedInfluence",
    "TracInCP",
    "Tuning",
    "codes",
    "readout",
]
