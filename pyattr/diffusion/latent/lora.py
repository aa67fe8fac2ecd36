"""LoRA weights in a U-Net: attached, read from disk, written to it."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors
from torch import nn

from ..storage import DamagedFileError
from .folder import package

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the linear layers of every attention
FILE = "pytorch_lora_weights.safetensors"
_PEFT_CONFIG, _PEFT_PREFIX = "adapter_config.json", "base_model.model."
_ADAPTER = "default"
_MARK = ".lora_"  # in the names of the weights, by peft's convention


def is_lora(name: str) -> bool:
    """Whether a parameter is one of LoRA's, from its name."""
    return _MARK in name


def attach(unet: nn.Module, rank: int, alpha: float | None) -> None:
    """New LoRA weights beside the linear layers of every attention, A random from torch's state and B zero.

    ``W x`` becomes ``W x + (alpha / rank) B A x``, with ``A ~ N(0, 1 / rank^2)``.
    """
    if isinstance(rank, bool) or not hasattr(rank, "__index__") or rank < 1:
        raise ValueError(f"latent.load: rank must be an integer of at least 1, got {rank}")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"latent.load: alpha must be positive, got {alpha}")
    config = package("peft").LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        init_lora_weights="gaussian",
        target_modules=list(TARGETS),
    )
    unet.add_adapter(config, adapter_name=_ADAPTER)
    _train_lora_alone(unet)


def read(unet: nn.Module, path: str | os.PathLike) -> None:
    """LoRA weights as diffusers writes them, a file or a folder with one, or as peft does, a folder.

    Raises:
        FileNotFoundError: there are none.
        DamagedFileError: the file cannot be read.
        ValueError: they are of something else than this U-Net.
    """
    path = Path(path)
    if path.is_dir() and not (path / _PEFT_CONFIG).is_file():
        path = path / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"latent.load: lora must be a file, or a folder with {FILE} or {_PEFT_CONFIG}, got {path}"
        )
    try:
        given, attach_to = _from_peft(path) if path.is_dir() else _from_diffusers(path)
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{path} is damaged ({error}): write the LoRA weights again") from None
    try:
        attach_to(unet)
    except (RuntimeError, KeyError, ValueError) as error:
        told = " ".join(str(error).split())  # torch's is of several lines
        raise ValueError(f"latent.load: {path} does not fit the U-Net: {told}") from error
    _train_lora_alone(unet)
    held = len(package("peft").get_peft_model_state_dict(unet, adapter_name=_ADAPTER))
    if held != given:
        raise ValueError(f"latent.load: {path} does not fit the U-Net: {given} LoRA tensors, of which it takes {held}")


def _from_diffusers(path: Path) -> tuple[int, Callable[[nn.Module], None]]:
    """The number of tensors in a file, and what puts them into a U-Net."""
    package("peft")  # or diffusers says what it lacks in its own words
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    tensors, alphas, metadata = Loader.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True, use_safetensors=True, return_lora_metadata=True
    )
    others = [name for name in tensors if not name.startswith("unet.")]
    if others or not tensors:
        raise ValueError(
            f"latent.load: {path} must hold LoRA weights of the U-Net and nothing else, got {(*others, 'none')[0]}"
        )
    return len(tensors), lambda unet: Loader.load_lora_into_unet(
        tensors, alphas, unet, adapter_name=_ADAPTER, metadata=metadata
    )


def _from_peft(folder: Path) -> tuple[int, Callable[[nn.Module], None]]:
    """The same for a folder of peft's."""
    peft = package("peft")
    config = peft.PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"latent.load: {folder} must hold LoRA weights, got {config.peft_type}")
    tensors = {
        name.removeprefix(_PEFT_PREFIX): tensor
        for name, tensor in peft.load_peft_weights(str(folder), device="cpu").items()
    }

    def attach_to(unet: nn.Module) -> None:
        unet.add_adapter(config, adapter_name=_ADAPTER)
        found = peft.set_peft_model_state_dict(unet, tensors, adapter_name=_ADAPTER)
        if found.unexpected_keys:
            raise KeyError(f"it has no {found.unexpected_keys[0]}")

    return len(tensors), attach_to


def _train_lora_alone(unet: nn.Module) -> None:
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_lora(name))


def set_dropout(unet: nn.Module, dropout: float) -> None:
    """The probability of the dropout behind every attention, while training.

    Source: the published code of Zheng et al., ICLR 2024 (D-TRAK): 0.1 on ArtBench.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"latent.load: dropout must lie in [0, 1), got {dropout}")
    for name, module in unet.named_modules():
        if name.endswith(".to_out.1") and isinstance(module, nn.Dropout):
            module.p = dropout


def save_lora(folder: str | os.PathLike, model: nn.Module) -> None:
    """Write a model's LoRA weights as ``pytorch_lora_weights.safetensors``, which diffusers' pipelines read too.

    Args:
        folder: created when it is missing.
        model: a :class:`~pyattr.diffusion.latent.LatentModel`.

    Raises:
        OSError: the folder is read-only or full; what was there stays.

    Extra memory: the weights twice.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    peft, unet, folder = package("peft"), model.unet, Path(folder)
    tensors = peft.get_peft_model_state_dict(unet, adapter_name=_ADAPTER)
    config = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in unet.peft_config[_ADAPTER].to_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-") as unfinished:
        Loader.save_lora_weights(
            unfinished,
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            unet_lora_adapter_metadata=config,
        )
        os.replace(Path(unfinished) / FILE, folder / FILE)
