"""The real packages of the standard networks, weights that nobody downloaded, and a network that is not there."""

import contextlib
import importlib
import sys
import types
import urllib.error
from pathlib import Path

import pytest
import torch

# Where `make test` puts torchvision and torchmetrics: not among the other packages, since a torchvision that was built for
# another torch keeps diffusers from being imported.
VISION = Path(sys.prefix) / "vision"


@pytest.fixture(scope="session")
def vision():
    """torchvision, and torchmetrics beside it."""
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("torchvision") is None:
            if not VISION.is_dir():
                pytest.skip("torchvision is not installed: `make test` installs it, or pip install pyattr[evaluation]")
            sys.path.append(str(VISION))
            stack.callback(sys.path.remove, str(VISION))
        try:
            import torchvision
        except RuntimeError as error:
            # A build for CUDA beside a CPU torch: its operators do not load, and then it fails for these two, of which no
            # network of ours has a use. Declared, they let the rest be imported.
            if "operator torchvision::nms does not exist" not in str(error):
                raise
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            import torchvision
        import torchmetrics.image.fid
        import torchmetrics.image.lpip
        import torchvision.models

        yield types.SimpleNamespace(models=torchvision.models, transforms=torchvision.transforms, metrics=torchmetrics)


@contextlib.contextmanager
def no_network(folder):
    """Torch's cache of weights in a folder, and no network to fill it from; the addresses that were asked for."""
    asked = []

    def urlopen(request, *args, **kwargs):
        asked.append(request.full_url)
        raise urllib.error.URLError("no route to host")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.hub.urlopen", urlopen)
        patch.setattr("torch.hub._hub_dir", None)
        patch.setenv("TORCH_HOME", str(folder))
        checkpoints = folder / "hub" / "checkpoints"
        checkpoints.mkdir(parents=True)
        yield types.SimpleNamespace(asked=asked, folder=checkpoints)


@pytest.fixture
def offline(tmp_path):
    """An empty cache, see :func:`no_network`."""
    with no_network(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache for a file's tests, see :func:`no_network`."""
    with no_network(tmp_path_factory.mktemp("torch")) as found:
        yield found
