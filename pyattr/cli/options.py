"""What can be chosen, and what is chosen when nobody does; free of torch, so that --help is instant."""

import dataclasses
import math
import re
from dataclasses import dataclass

# name on the command line -> name for people
METHODS = {
    "dtrak": "D-TRAK",
    "das": "DAS",
    "probed-das": "ProbedDAS",
    "trak": "TRAK",
    "journey-trak": "Journey TRAK",
    "relative-influence": "Relative influence",
    "renormalized-influence": "Renormalized influence",
    "gradient-dot": "Gradient dot",
    "gradient-cosine": "Gradient cosine",
    "tracincp": "TracInCP",
    "gas": "GAS",
    "nda": "NDA",
    "pixels": "Pixel",
    "clip-similarity": "CLIP-feature similarity",
    "empirical-influence": "Empirical influence",
    "datamodel": "Datamodel",
    "magic": "MAGIC",
}
RETRAINING = ("empirical-influence", "datamodel")
HISTORY = ("tracincp", "gas")
GRADIENTS = tuple(name for name in METHODS if name not in ("nda", "pixels", "clip-similarity", *RETRAINING, "magic"))
DAMPED = tuple(name for name in GRADIENTS if name not in ("gradient-dot", "gradient-cosine", *HISTORY))
SOLVED = tuple(name for name in DAMPED if name != "probed-das")  # by an inverse in either precision
AVERAGED = tuple(
    name for name in GRADIENTS if name not in ("journey-trak", *HISTORY)
)  # whose scores several models have
LATENT = (*AVERAGED, "pixels", "clip-similarity")  # that a model of latents, or none, can be asked
SOLVES = ("float64", "float32")
NEEDS_MODEL = frozenset(GRADIENTS)

FEATURES = (
    "simple",
    "elbo",
    "square",
    "avg",
    "l1",
    "l2",
    "linf",
    "interpolate",
)  # as pyattr.diffusion.losses names them
SIMILARITIES = ("cosine", "dot")
READOUTS = ("signed", "squared", "signed-squared", "head")  # as pyattr.attribution names them, but for the hyphen
MAGIC_NETWORKS = ("score-net", "mnist-small", "cifar", "celeba")
MAGIC_PHIS = ("loss", "likelihood")
MAGIC_DIVERGENCES = ("hutchinson", "exact")
MAGIC_CHECKPOINTING = ("auto", "all", "sqrt", "tree", "binomial")  # as pyattr.attribution.magic names them
# option of one phi -> that phi
MAGIC_PHI_OF = {
    "--magic-draws": "loss",
    "--magic-divergence": "likelihood",
    "--magic-probes": "likelihood",
    "--magic-solver-steps": "likelihood",
}
SQUARES = ("das", "probed-das")  # methods whose score is the square of a number that has a sign

# option of `attribute` -> the methods that have it; the others are of the command as a whole
GOES_WITH = {
    "--num-timesteps": GRADIENTS,
    "--strategy": GRADIENTS,
    "--num-noises": GRADIENTS,
    "--query-noises": GRADIENTS,
    "--projection": GRADIENTS,
    "--proj-dim": GRADIENTS,
    "--feature": GRADIENTS,
    "--eta": GRADIENTS,
    "--normalize": GRADIENTS,
    "--memory": (*GRADIENTS, "magic"),
    "--batch-size": GRADIENTS,
    "--seed": (*GRADIENTS, "nda", "magic"),
    "--lambda": DAMPED,
    "--residuals": ("das",),
    "--leverage": ("das",),
    "--checkpoints": HISTORY,
    "--solve-dtype": SOLVED,
    "--probes": ("probed-das",),
    "--train-probes": ("probed-das",),
    "--patch-timesteps": ("nda",),
    "--patch-k": ("nda",),
    "--patch-noises": ("nda",),
    "--similarity": ("pixels", "clip-similarity"),
    "--centre": ("pixels",),
    "--clip": ("clip-similarity",),
    "--epochs": ("clip-similarity",),
    "--pool": RETRAINING,
    "--target": RETRAINING,
    "--magic-network": ("magic",),
    "--magic-steps": ("magic",),
    "--magic-batch-size": ("magic",),
    "--magic-learning-rate": ("magic",),
    "--magic-eps-root": ("magic",),
    "--magic-phi": ("magic",),
    **{option: ("magic",) for option in MAGIC_PHI_OF},
    "--magic-checkpointing": ("magic",),
    "--check-smoothness": ("magic",),
}

_UNITS = {"": 1 << 30, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def readout_word(name: str) -> str:
    """A readout as it is written on the command line, from that or from its name in the library."""
    return name.replace("_", "-")


def readout_name(word: str) -> str:
    """A readout as the library and files name it."""
    return word.replace("-", "_")


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


def parse_lambda(text: str) -> float | tuple[float, ...]:
    """A number from "500", several from "10,100,1000".

    Raises:
        ValueError: one of them is none, or neither positive nor finite.
    """
    values = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"must be positive and finite, a number or several with commas between, got {text}")
        values.append(value)
    return values[0] if len(values) == 1 else tuple(values)


@dataclass(frozen=True)
class DataOptions:
    """Which images: a source of :func:`pyattr.datasets.load`, resized to `size`, at most `limit` of them."""

    source: str
    size: int | None = None
    limit: int | None = None
    root: str | None = None


@dataclass(frozen=True)
class LatentOptions:
    """Models of latents: the folder of a Stable Diffusion pipeline, LoRA weights, one model for each, and a file of prompts."""

    pipeline: str
    loras: tuple[str, ...]
    prompts: str


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


@dataclass(frozen=True)
class KeepOptions:
    """Which checkpoints of a training stay; see :func:`pyattr.diffusion.train`."""

    every: int | None = None
    count: int = 2


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
    """How images are generated; see :func:`pyattr.diffusion.sample`. `trajectory` keeps the way from the noise as well."""

    num_images: int = 8
    method: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    seed: int = 0
    batch_size: int = 64
    trajectory: bool = False


@dataclass(frozen=True)
class ScoreOptions:
    """A method of gradients and its settings (see :class:`pyattr.attribution.TRAK`).

    `feature` and `normalize` None are the method's own; `lambda_` is a number, several of which one is chosen, or None;
    `residuals` and `leverage` weigh the images of DAS; `checkpoints` is how many of the training's count, None for all, of
    the methods of :data:`HISTORY`; `solve_dtype` is of the inverse; `probes`, `train_probes` are directions of ProbedDAS.
    """

    method: str = "dtrak"
    num_timesteps: int = 10
    strategy: str = "uniform"
    feature: str | None = None
    eta: float | None = None
    normalize: bool | None = None
    num_noises: int = 1
    query_noises: int = 1
    kind: str = "rademacher"
    proj_dim: int = 4096
    lambda_: float | tuple[float, ...] | None = None
    residuals: bool = False
    leverage: bool = False
    checkpoints: int | None = None
    solve_dtype: str = "float64"
    probes: int = 8
    train_probes: int = 1
    seed: int = 0
    batch_size: int = 16
    memory: int = 2 << 30  # bytes for the gradients of a batch; moves scores by rounding only


def own_options(options: ScoreOptions) -> dict[str, object]:
    """The options that the method has; what stands beside them is of other methods."""
    return {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if options.method in GOES_WITH.get("--" + name.rstrip("_").replace("_", "-"), GRADIENTS)
    }


@dataclass(frozen=True)
class PatchOptions:
    """The settings of NDA (see :class:`pyattr.attribution.NDA`); its timesteps lie evenly in the first half."""

    method: str = "nda"
    num_timesteps: int = 5
    k: int = 100
    num_noises: int = 1
    seed: int = 0


@dataclass(frozen=True)
class PixelOptions:
    """See :class:`pyattr.attribution.RawPixel`."""

    method: str = "pixels"
    similarity: str = "cosine"
    centre: bool = True


@dataclass(frozen=True)
class EncoderOptions:
    """See :class:`pyattr.attribution.CLIPSimilarity`.

    `clip` is a folder of transformers' CLIPModel; None: a classifier trained on the labels for `epochs` stands in.
    """

    method: str = "clip-similarity"
    similarity: str = "cosine"
    clip: str | None = None
    epochs: int = 6


@dataclass(frozen=True)
class PoolOptions:
    """See :class:`pyattr.attribution.Datamodel`: a file of losses of retrained models, and which of its functions."""

    method: str
    pool: str
    target: str = "simple"


@dataclass(frozen=True)
class MagicOptions:
    """A network that MAGIC trains, its recipe, and the function of the trained network that is differentiated.

    `network` is "score-net" or a preset; `phi` is "loss", over `draws`, or "likelihood", in `solver_steps` and by
    `divergence`, along `probes` directions where that is "hutchinson"; `checkpointing`, `memory` (bytes) say which states are
    kept, which moves no score; `check_smoothness` measures the recipe beside it. See :class:`pyattr.attribution.MAGIC`.
    """

    method: str = "magic"
    network: str = "mnist-small"
    steps: int = 600
    train_batch_size: int = 64
    learning_rate: float = 5e-4
    eps_root: float = 1e-4
    phi: str = "loss"
    draws: int = 256
    divergence: str = "hutchinson"
    probes: int = 16
    solver_steps: int = 10
    checkpointing: str = "auto"
    memory: int = 2 << 30
    check_smoothness: bool = False
    seed: int = 0


MethodOptions = ScoreOptions | PatchOptions | PixelOptions | EncoderOptions | PoolOptions | MagicOptions


@dataclass(frozen=True)
class ReadoutOptions:
    """What is read out of scores, by its name in the library (see :class:`pyattr.attribution.Readout`)."""

    kind: str
    percent: float | None = None


@dataclass(frozen=True)
class Machine:
    """Where torch works: a device ("auto" takes a GPU when there is one) and processor threads (None: all)."""

    device: str = "auto"
    threads: int | None = None
