"""dattri's tests of its projections, and of the attributors that project, with pyattr.compat.dattri."""

from ..peer import Adapted, Peer

PROJECTORS = """from dattri.func.projection import (
    ArnoldiProjector,
    BasicProjector,
    ChunkedCudaProjector,
    CudaProjector,
    arnoldi_project,
    random_project,
)"""
OURS = """from dattri.func.projection import ArnoldiProjector, arnoldi_project
from pyattr.compat.dattri import BasicProjector, ChunkedCudaProjector, CudaProjector, random_project"""

PEER = Peer(
    distribution="dattri==0.3.0",
    packages=("numpy", "scipy", "pyyaml", "tqdm", "requests"),
    tests=(
        Adapted(
            path="test/dattri/func/test_proj.py",
            edits=(
                (PROJECTORS, OURS),
                # Here the tests that it keeps for a GPU, sjlt and grass among them, run on the CPU.
                ('torch.device("cuda")', 'torch.device("cpu")'),
                ('"cuda",', '"cpu",'),
            ),
            left_out={
                "TestRandomProjectionFactory.test_chunkedcudaprojector": "its gradients, of 200 million parameters, are 13 GB",
                "TestRandomProjectionFactory.test_tensor_input_chunked_cuda": "300 million columns take minutes of one core",
            },
        ),
        Adapted(path="test/dattri/algorithm/test_trak.py"),
        Adapted(
            path="test/dattri/algorithm/test_tracin.py",
            left_out={
                "TestTracInAttributor.test_cifar2_multi_ckpts_grad": "projects nothing, and takes five minutes of one core"
            },
        ),
        Adapted(path="test/dattri/algorithm/test_logra.py"),
        Adapted(path="test/dattri/algorithm/test_factgrass.py"),
        Adapted(path="test/dattri/algorithm/test_dvemb.py"),
    ),
)
