"""A folder as diffusers saves a pipeline: what is in it, and one part after the other."""

import importlib
import json
import os
import types
from pathlib import Path

import torch
from torch import Tensor, nn

from ..presets import diffusers
from ..schedule import ScaledLinearSchedule, Schedule

PIPELINE = "StableDiffusionPipeline"
PARTS = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "unet": "UNet2DConditionModel",
}
_SCHEDULES = {"linear": Schedule, "scaled_linear": ScaledLinearSchedule}
_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end")
PREDICTIONS = ("epsilon", "v_prediction")
# Settings of a U-Net under which it asks for more than an image, a time and a prompt.
_FURTHER_INPUTS = ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
_PROMPTS = 64  # that the text encoder takes together


def package(name: str) -> types.ModuleType:
    """A package that latent models need beside diffusers.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"latent models need the package {name}: install pyattr[lora]") from None


def check_folder(folder: str | os.PathLike, op: str) -> Path:
    """Refuse what is not the folder of a pipeline that we know how to run.

    Raises:
        FileNotFoundError: it is no pipeline's folder, or a part is missing.
        ValueError: it is of another kind.
    """
    folder = Path(folder)
    index = _read(folder / "model_index.json", op, f"{folder} is not the folder of a diffusers pipeline")
    if index.get("_class_name") != PIPELINE:
        raise ValueError(f"{op}: {folder} must hold a {PIPELINE}, got {index.get('_class_name')}")
    for part, kind in PARTS.items():
        found = (index.get(part) or [None, None])[1]
        # Transformers calls the two tokenizers alike, whichever of them is there.
        if str(found).removesuffix("Fast") != kind:
            raise ValueError(f"{op}: the {part} of {folder} must be a {kind}, got {found}")
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{op}: {folder} has no folder {part}")
    return folder


def read_schedule(folder: str | os.PathLike) -> tuple[Schedule, str]:
    """What a pipeline was trained with, from the configuration of its scheduler.

    Args:
        folder: of the pipeline.

    Returns:
        The schedule, and what its network predicts: "epsilon" or "v_prediction".

    Raises:
        FileNotFoundError: there is no such configuration.
        ValueError: betas that are neither linear nor scaled-linear, or not told, or another kind of prediction.
    """
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    config = _read(path, "read_schedule", f"{folder} has no configuration of a scheduler")
    kind, prediction = config.get("beta_schedule"), config.get("prediction_type", "epsilon")
    if kind not in _SCHEDULES or config.get("trained_betas") is not None:
        given = kind if config.get("trained_betas") is None else "betas of its own"
        raise ValueError(f"read_schedule: the betas of {folder} must be one of {', '.join(_SCHEDULES)}, got {given}")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"read_schedule: the betas of {folder} must not be rescaled to zero signal at the last timestep"
        )
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"read_schedule: the network of {folder} must predict one of {', '.join(PREDICTIONS)}, got {prediction}"
        )
    for name in _SETTINGS:
        if not isinstance(config.get(name), int | float):
            raise ValueError(
                f"read_schedule: the scheduler of {folder} must say {', '.join(_SETTINGS)}, got {name} {config.get(name)!r}"
            )
    return _SCHEDULES[kind](*(config[name] for name in _SETTINGS)), prediction


def load_unet(folder: Path, op: str) -> nn.Module:
    """The U-Net, float32, in eval mode."""
    kind = diffusers().UNet2DConditionModel
    unet = kind.from_pretrained(folder, subfolder="unet", local_files_only=True, torch_dtype=torch.float32)
    for name in _FURTHER_INPUTS:
        if unet.config.get(name) is not None:
            raise ValueError(
                f"{op}: the U-Net of {folder} must take nothing but a prompt, got {name} {unet.config[name]!r}"
            )
    if unet.config.in_channels != unet.config.out_channels:
        raise ValueError(
            f"{op}: the U-Net of {folder} must have as many inputs as outputs, "
            f"got {unet.config.in_channels} and {unet.config.out_channels} channels"
        )
    return unet.eval()


def load_vae(folder: Path) -> nn.Module:
    """The autoencoder, float32, in eval mode, frozen."""
    kind = diffusers().AutoencoderKL
    vae = kind.from_pretrained(folder, subfolder="vae", local_files_only=True, torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def embed_prompts(folder: Path, prompts: list[str], op: str) -> Tensor:
    """The text encoder's last layer for each prompt, filled up to the encoder's length: [n, L, d] float32 on the CPU.

    Raises:
        ValueError: a prompt is longer than the text encoder takes.
    """
    transformers = package("transformers")
    words = transformers.CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    encoder = transformers.CLIPTextModel.from_pretrained(str(folder / "text_encoder"), local_files_only=True)
    encoder = encoder.float().eval()
    length = min(words.model_max_length, encoder.config.max_position_embeddings)
    found = []
    for start in range(0, len(prompts), _PROMPTS):
        some = prompts[start : start + _PROMPTS]
        for prompt, tokens in zip(some, words(some).input_ids, strict=True):
            if len(tokens) > length:
                raise ValueError(f"{op}: prompts must have at most {length} tokens, got {len(tokens)}: {prompt!r}")
        filled = words(some, padding="max_length", max_length=length, return_tensors="pt")
        masked = getattr(encoder.config, "use_attention_mask", False)
        out = encoder(filled.input_ids, attention_mask=filled.attention_mask if masked else None)
        found.append(out.last_hidden_state)
    return torch.cat(found)


def _read(path: Path, op: str, missing: str) -> dict:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{op}: {missing}: {path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{op}: {path} is damaged ({error})") from None
