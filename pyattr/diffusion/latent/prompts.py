"""From classes and captions to the numbers of prompts."""

from collections.abc import Sequence

import torch
from torch import Tensor

CLASS = "{class}"


def class_prompts(template: str, names: Sequence[str]) -> list[str]:
    """A prompt for each class, in whose number the labels of images then are numbers of prompts.

    Args:
        template: with ``{class}`` where the name goes, "a {class} painting".
        names: of the classes; ``_`` becomes a space.

    Returns:
        As many prompts.

    Raises:
        ValueError: the template has no place for the name.

    Source: Zheng et al., ICLR 2024 (D-TRAK), on ArtBench.
    """
    if CLASS not in template:
        raise ValueError(f"class_prompts: template must have a place {CLASS}, got {template!r}")
    return [template.replace(CLASS, name.replace("_", " ")) for name in names]


def index_prompts(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct ones among captions, in the order in which they come, and which of them each is.

    Args:
        captions: N.

    Returns:
        The prompts, and [N] int64.
    """
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(caption, len(numbers)) for caption in captions]
    return list(numbers), torch.tensor(found, dtype=torch.int64)
