"""Latent diffusion models told what to paint: Stable Diffusion from a local folder, with LoRA weights that are trained."""

from .codec import Codec
from .folder import read_schedule
from .lora import save_lora
from .model import LatentModel, load
from .prompts import class_prompts, index_prompts

__all__ = ["Codec", "LatentModel", "class_prompts", "index_prompts", "load", "read_schedule", "save_lora"]
