"""TRAK's projector tests and its TRAKer tests, with pyattr.compat.trak.Projector."""

from ..peer import Adapted, Peer

ON_THE_CPU = ("cuda:0", "cpu")

PEER = Peer(
    distribution="traker==0.3.2",
    packages=("numpy<2", "tqdm", "assertpy"),
    tests=(
        Adapted(
            path="tests/test_jl.py",
            edits=(
                ("BasicProjector = CudaProjector", "from pyattr.compat.trak import Projector as BasicProjector"),
                ON_THE_CPU,
                # The list that is meant for every day; the second one, of up to 23 GB a tensor, replaced it.
                ("PARAM = list(\n    product(\n        [123],", "GIANTS = list(\n    product(\n        [123],"),
                ("            (1, int(1e9)),\n", ""),
                ("[0, 1, 10**8],  # seed", "[10**8],  # seed"),
            ),
        ),
        Adapted(
            path="tests/test_class.py",
            edits=(
                # torchvision has no part in it, and the ResNet's 11.7 million columns only take time.
                ("from torchvision.models import resnet18", "from conftest import small_cnn as resnet18"),
                ("grad_dim=11689512", "grad_dim=sum(p.numel() for p in resnet18().parameters())"),
                ("from trak.projectors import BasicProjector, NoOpProjector", "from trak.projectors import NoOpProjector"),
                ("BasicProjector(", "Projector("),
                ("import torch as ch\n", "import torch as ch\nfrom pyattr.compat.trak import Projector\n"),
                ON_THE_CPU,
                (".cuda()", ""),
            ),
        ),
    ),
)
