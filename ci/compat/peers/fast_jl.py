"""TRAK's tests of its extension, and of CudaProjector on it, with pyattr.compat.fast_jl in its place on the CPU.

fast_jl itself needs nvcc and a CUDA build of torch, and its source distribution carries no tests.
"""

from ..peer import Adapted, Peer
from .trak import A_COIN_TOSS, EDITS_OF_TEST_JL, ON_THE_CPU

# Theirs is the number of the card's multiprocessors.
TILES = ("ch.cuda.get_device_properties(\n        ch.cuda.current_device()\n    ).multi_processor_count", "108")
# The normal matrices of the same inputs are tested with the projector.
SIGNS = ("[ProjectionType.normal, ProjectionType.rademacher]", "[ProjectionType.rademacher]")

PEER = Peer(
    distribution="traker==0.3.2",
    environment="trak",
    tests=(
        Adapted(path="tests/test_rademacher.py", edits=(ON_THE_CPU, TILES)),
        Adapted(path="tests/test_jl_additional.py", edits=(ON_THE_CPU,)),
        Adapted(path="tests/test_jl.py", edits=(ON_THE_CPU, *EDITS_OF_TEST_JL, SIGNS), left_out=A_COIN_TOSS),
    ),
)
