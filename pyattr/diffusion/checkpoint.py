"""Models on disk: the weights together with what it takes to build the network again."""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import torch
from torch import nn

from .presets import PatchUNet, diffusers
from .schedule import Schedule, as_schedule
from .storage import load_record, load_tensors, model_hash, save_tensors


def checkpoints(directory: str | os.PathLike) -> dict[int, Path]:
    """The checkpoints in a directory by step, oldest first; empty when there are none or there is no directory."""
    return numbered(directory, "checkpoint")


def numbered(directory: str | os.PathLike, kind: str) -> dict[int, Path]:
    """The files ``<kind>-<step>.safetensors`` of a directory by step, rising; empty when there is no directory."""
    if not Path(directory).is_dir():
        return {}
    name = re.compile(rf"{kind}-(\d{{8}})\.safetensors")
    found = ((name.fullmatch(path.name), path) for path in sorted(Path(directory).iterdir()))
    return {int(match[1]): path for match, path in found if match}


def architecture(model: nn.Module) -> dict | None:
    """The class and configuration of a network that :func:`load_model` can build; None for any other."""
    kind = type(model)
    if kind is PatchUNet:
        inner, schedule = architecture(model.unet), dataclasses.asdict(model.schedule)
        return inner and {"class": "PatchUNet", "patch": model.patch, "schedule": schedule, "unet": inner}
    if kind.__name__ == "UNet2DModel" and kind.__module__.startswith("diffusers."):
        # Names with an underscore are where and by which version a configuration was saved.
        config = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
        return {"class": "UNet2DModel", "config": json.loads(json.dumps(config))}
    return None


def identity(model: nn.Module) -> dict:
    """What tells a network from others whose names and shapes of weights are the same, for the settings of stored results.

    Returns:
        "model": a hash of weights and buffers. "network": :func:`architecture`, or the class and printed arguments of every
        module, since dropout, heads or epsilons leave no trace in the weights. "modules": beside an architecture, a hash of the
        latter, which sees what was changed since. "frozen": the parameters that take no gradient. A model made of others says
        all that itself, by a method of this name.
    """
    if hasattr(model, "identity"):
        return model.identity()
    layers = {
        name or "itself": f"{type(module).__name__}({module.extra_repr()})" for name, module in model.named_modules()
    }
    network = architecture(model)
    return {
        "model": model_hash(model),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "network": network or layers,
        **({"modules": hashlib.sha256(json.dumps(layers).encode()).hexdigest()} if network else {}),
    }


def build(described: dict) -> nn.Module:
    """A network from :func:`architecture`'s description, with random weights."""
    if described["class"] == "PatchUNet":
        return PatchUNet(build(described["unet"]), described["patch"], as_schedule(described["schedule"]))
    return diffusers().UNet2DModel.from_config(described["config"])


def save_model(
    path: str | os.PathLike,
    model: nn.Module,
    *,
    schedule: Schedule | None = None,
    images: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model's weights and architecture into one safetensors file, whole or not at all.

    Args:
        path: the file; its folder must exist.
        schedule: the one that the model was trained with, kept for :func:`trained_with`.
        images: the :func:`~pyattr.diffusion.storage.data_hash` of those that it was trained on, likewise.
        dtype: what weights are rounded to in the file, float16 to halve it; buffers, which may be tables that a network
            computes with, stay as they are, and :func:`load_model` makes the weights what they were but for the rounding.
            None: no rounding.

    Extra memory: the weights once more.
    """
    weights = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    tensors = {
        f"model.{name}": tensor if dtype is None or name not in weights else tensor.to(dtype)
        for name, tensor in model.state_dict().items()
    }
    record = {"kind": "model", "model": architecture(model)}
    if schedule is not None:
        record["schedule"] = dataclasses.asdict(schedule)
    if images is not None:
        record["images"] = images
    save_tensors(path, tensors, record)


def trained_with(path: str | os.PathLike) -> tuple[Schedule | None, str | None]:
    """What a file or folder that :func:`load_model` reads says of its model's training.

    Returns:
        The schedule and the :func:`~pyattr.diffusion.storage.data_hash` of the images; None for what it does not say.

    Raises:
        FileNotFoundError, DamagedFileError, ValueError: see :func:`load_model`.
    """
    path = _newest(path)
    record = _of_model(load_record(path), path)
    settings = record.get("settings", {})
    built_in = (record["model"] or {}).get("schedule")
    schedule = settings.get("schedule") or record.get("schedule") or built_in
    return schedule and as_schedule(schedule), settings.get("images") or record.get("images")


def _newest(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_dir():
        return path
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(f"{path} holds no checkpoint: train a model into it first")
    return found[max(found)]


def _of_model(record: dict, path: Path) -> dict:
    if record.get("kind") not in ("model", "checkpoint"):
        raise ValueError(f"load_model: {path} does not hold a model")
    return record


def load_model(path: str | os.PathLike, *, average: bool = True, into: nn.Module | None = None) -> nn.Module:
    """Read a model from a file of :func:`save_model`, a training checkpoint, or a folder of checkpoints.

    Args:
        path: the file, or the folder, whose newest checkpoint is taken.
        average: take the moving average of the weights where a checkpoint has one.
        into: the network to load into; needed where the file does not describe one that can be built (a network that is
            neither a diffusers UNet2DModel nor a preset).

    Returns:
        The model, on the CPU (or ``into`` where it lies), in eval mode.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        DamagedFileError: the bytes changed since they were written.
        ValueError: the file does not hold a model, or ``into`` is missing.
        ImportError: diffusers is needed and missing.
    """
    path = _newest(path)
    tensors, record = load_tensors(path)
    _of_model(record, path)
    if into is None and record["model"] is None:
        raise ValueError(f"load_model: {path} does not say how to build its network: give one with into=")
    model = build(record["model"]) if into is None else into
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    if average:
        # After the others: a weight used under two names has one average, and would be overwritten through the other name.
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.startswith("average."):
                    parameters[name.removeprefix("average.")].copy_(tensor)
    return model.eval()
