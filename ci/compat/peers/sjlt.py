"""sjlt's tests, with pyattr.compat.sjlt. Its package needs nvcc to be built and a GPU to be used, so ours takes its name."""

from ..peer import Adapted, Peer

PEER = Peer(
    distribution="sjlt==0.1.7",
    packages=("numpy",),
    installed=False,
    environment="dattri",
    tests=(
        Adapted(
            path="test/test_sjlt.py",
            edits=(
                ('@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA not available")\n', ""),
                ("device='cuda'", "device='cpu'"),
            ),
        ),
    ),
)
