"""What can be chosen, and what is chosen when nobody does; free of torch, so that --help is instant."""

import re
from dataclasses import dataclass

# name on the command line -> name for people
METHODS = {
    "dtrak": "D-TRAK",
    "trak": "TRAK",
    "relative-influence": "Relative influence",
    "renormalized-influence": "Renormalized influence",
    "gradient-dot": "Gradient dot",
    "gradient-cosine": "Gradient cosine",
    "nda": "NDA",
    "pixels": "Pixel cosine",
}
NEEDS_MODEL = METHODS.keys() - {"nda", "pixels"}

_UNITS = {"": 1 << 30, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str) -> int:
    """A number of bytes from "1.5" (GiB), "512MiB" or "2GB".

    Raises:
        ValueError: it is of another form, or less than a byte.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", text.lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size < 1:
        raise ValueError(f"must be a number of GiB, or of bytes with a unit (512MiB, 2GB), got {text}")
    return size


@dataclass(frozen=True)
class DataOptions:
    """Which images: a source of :func:`pyattr.datasets.load`, resized to `size`, at most `limit` of them."""

    source: str
    size: int | None = None
    limit: int | None = None
    root: str | None = None


@dataclass(frozen=True)
class TrainOptions:
    """A network and how it is trained; see :func:`pyattr.diffusion.train`."""

    network: str = "mnist-small"
    steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.95, 0.999)
    warmup: float = 0.1
    flip: bool = False
    dropout: float = 0.0
    ema: float | None = None
    weighting: str = "simple"
    seed: int = 0


CODES = ("items", "classes", "walsh")


@dataclass(frozen=True)
class CodeOptions:
    """Which members of an ensemble see which images; see :mod:`pyattr.attribution.codes`.

    `kind` is "items", a random code for each image, "classes", one for each label, or "walsh", a Walsh code for each label.
    """

    num_members: int = 16
    kind: str = "items"
    weight: int | None = None
    seed: int = 0


EXTRACTORS = ("classifier", "standard")


@dataclass(frozen=True)
class EvaluateOptions:
    """What of an ensemble is measured, and by which features.

    `items` training images are ablated, drawn by `seed`, and guessed, unless `guesses` is False; `extractor` is "classifier",
    trained on the folder's labels for `epochs`, or "standard".
    """

    items: int = 16
    guesses: bool = True
    extractor: str = "classifier"
    epochs: int = 6
    seed: int = 0
    batch_size: int = 64
    jacobian_batch_size: int = 8


@dataclass(frozen=True)
class SampleOptions:
    """How images are generated; see :func:`pyattr.diffusion.sample`."""

    num_images: int = 8
    method: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    seed: int = 0
    batch_size: int = 64


@dataclass(frozen=True)
class ScoreOptions:
    """A method and its settings (see :class:`pyattr.attribution.TRAK`); "pixels", a baseline, has none."""

    method: str = "dtrak"
    num_timesteps: int = 10
    strategy: str = "uniform"
    query_noises: int = 1
    kind: str = "rademacher"
    proj_dim: int = 4096
    lambda_: float | None = None
    seed: int = 0
    batch_size: int = 16
    memory: int = 2 << 30  # bytes for the gradients of a batch; moves scores by rounding only


@dataclass(frozen=True)
class PatchOptions:
    """The settings of NDA (see :class:`pyattr.attribution.NDA`); its timesteps lie evenly in the first half."""

    method: str = "nda"
    num_timesteps: int = 5
    k: int = 100
    num_noises: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Machine:
    """Where torch works: a device ("auto" takes a GPU when there is one) and processor threads (None: all)."""

    device: str = "auto"
    threads: int | None = None
