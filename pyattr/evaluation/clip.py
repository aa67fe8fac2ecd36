"""CLIP's image encoder as an extractor of features."""

import os

import torch.nn.functional as F
from torch import Tensor, nn

from .features import Extractor, as_colour, package

CLIP = "openai/clip-vit-base-patch32"
# Of the published preprocessing, for red, green and blue in [0, 1].
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class _Images(nn.Module):
    """The image half of a CLIPModel, [B, 3, S, S] -> [B, D]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, pixels: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output)


def clip(weights: str | os.PathLike = CLIP) -> Extractor:
    """CLIP's image features: the projected embedding, not normalised.

    Grey becomes three equal channels; the shorter side is resized to the network's (bicubic, antialiased), the centre square
    cut out, and colours are normalised, as published but for the rounding to 8 bits between.

    Args:
        weights: a folder of transformers' CLIPModel, or the name of one in its cache; nothing is downloaded.

    Returns:
        An extractor of the name "CLIP"; [N, 512] for the default weights.

    Raises:
        ImportError: transformers is missing.
        RuntimeError: the weights are not at hand, or are not those of a CLIPModel; the message says what to do instead.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
    """
    transformers = package("transformers", "clip")
    try:
        model, info = transformers.CLIPModel.from_pretrained(weights, local_files_only=True, output_loading_info=True)
    except OSError as error:
        raise RuntimeError(_lacking(weights, str(error).split("\n")[0])) from error
    missing = sorted(key for key in info["missing_keys"] if key.startswith(("vision_model.", "visual_projection.")))
    if missing:
        # They would be drawn at random.
        raise RuntimeError(_lacking(weights, f"there is no {missing[0]}"))
    size = model.config.vision_config.image_size

    def prepare(images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 3, size, size]
        height, width = (round(side * size / min(images.shape[2:])) for side in images.shape[2:])
        images = (as_colour(images, "clip") + 1) / 2
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
        top, left = (height - size) // 2, (width - size) // 2
        images = images[..., top : top + size, left : left + size].clamp(0, 1)
        return (images - images.new_tensor(MEAN)[:, None, None]) / images.new_tensor(STD)[:, None, None]

    return Extractor("CLIP", _Images(model).eval(), prepare)


def _lacking(weights: str | os.PathLike, why: str) -> str:
    return (
        f"clip: the weights {weights} cannot be had ({why}): give the folder of a CLIPModel, put {CLIP} into the cache of "
        "Hugging Face, or compare the features of a classifier of the data, CLIPSimilarity(classifier.extractor), "
        "under their own name"
    )
