"""TRAK's tests of its extension, and of CudaProjector on it, with pyattr.compat.fast_jl in its place on the CPU.

fast_jl itself needs nvcc and a CUDA build of torch, and its source distribution carries no tests.
"""

from ..peer import Adapted, Peer

ON_THE_CPU = ("cuda:0", "cpu")
# Theirs is the number of the card's multiprocessors.
TILES = (
    "ch.cuda.get_device_properties(\n        ch.cuda.current_device()\n    ).multi_processor_count",
    "108",
)

PEER = Peer(
    distribution="traker==0.3.2",
    environment="trak",
    tests=(
        Adapted(path="tests/test_rademacher.py", edits=(ON_THE_CPU, TILES)),
        Adapted(path="tests/test_jl_additional.py", edits=(ON_THE_CPU,)),
        Adapted(
            path="tests/test_jl.py",
            edits=(
                ON_THE_CPU,
                ("PARAM = list(\n    product(\n        [123],", "GIANTS = list(\n    product(\n        [123],"),
                # As for the projector, and the normal matrices of the wide inputs are tested there.
                ("            (1, int(1e9)),\n", ""),
                ("[0, 1, 10**8],  # seed", "[10**8],  # seed"),
                ("[ProjectionType.normal, ProjectionType.rademacher]", "[ProjectionType.rademacher]"),
            ),
        ),
    ),
)
