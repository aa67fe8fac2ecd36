"""A U-Net that is told a prompt, as a model that predicts noise."""

import hashlib
import json
import os
from collections.abc import Sequence

from torch import Tensor, nn

from ..schedule import Schedule
from ..storage import tensors_hash
from . import lora as lora_weights
from .folder import check_folder, embed_prompts, load_unet, read_schedule
from .lora import is_lora


class LatentModel(nn.Module):
    """``e(x_t, t, c)`` on latents, c the number of a prompt; its LoRA weights are all that takes a gradient.

    A network that predicts the velocity v is made to predict ``e = sqrt(abar_t) v + sqrt(1 - abar_t) x_t``.

    The state dict holds the LoRA weights alone, so checkpoints are small; what is loaded replaces these and nothing else.
    Everything else, the frozen network and the embeddings of the prompts too, is part of :meth:`identity`.

    Args:
        unet: a diffusers UNet2DConditionModel with LoRA weights.
        embeddings: [n + 1, L, d], of n prompts, and last of the empty one.
        schedule: the one it was trained with.
        prediction: what the network predicts, "epsilon" or "v_prediction".

    Attributes:
        num_conditions: n.
        unconditional: n, the condition that says nothing.
        latents: True: what it works on has no range to be clipped to.
    """

    latents = True

    def __init__(self, unet: nn.Module, embeddings: Tensor, schedule: Schedule, prediction: str):
        super().__init__()
        self.unet, self.schedule, self.prediction = unet, schedule, prediction
        self.register_buffer("embeddings", embeddings, persistent=False)
        self._frozen_hash: tuple[list, str] | None = None
        self.register_state_dict_post_hook(_leave_lora)
        self.register_load_state_dict_post_hook(_miss_lora_alone)

    @property
    def num_conditions(self) -> int:
        """n, the number of prompts."""
        return len(self.embeddings) - 1

    @property
    def unconditional(self) -> int:
        """The condition of the empty prompt; for guidance, not among those of images."""
        return len(self.embeddings) - 1

    @property
    def config(self) -> dict:
        """``in_channels`` and ``sample_size`` of the latents."""
        return {name: self.unet.config[name] for name in ("in_channels", "sample_size")}

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        """[B, c, h, w], [B], [B] -> [B, c, h, w]."""
        told = self.embeddings[conditions]  # [B, L, d]
        out = self.unet(latents, timesteps, encoder_hidden_states=told, return_dict=False)[0]
        if self.prediction == "epsilon":
            return out
        abar = self.schedule.alphas_cumprod[timesteps.cpu()][:, None, None, None]  # [B, 1, 1, 1]
        signal, spread = (c.to(latents) for c in (abar.sqrt(), (1 - abar).sqrt()))
        return signal * out + spread * latents

    def identity(self) -> dict:
        """What tells it from other models; see :func:`pyattr.diffusion.checkpoint.identity`."""
        layers = {name: f"{type(module).__name__}({module.extra_repr()})" for name, module in self.unet.named_modules()}
        scales = {name: module.scaling for name, module in self.unet.named_modules() if hasattr(module, "scaling")}
        return {
            "model": tensors_hash(self.state_dict()),
            "frozen": [name for name, p in self.named_parameters() if is_lora(name) and not p.requires_grad],
            "network": {
                "class": "LatentModel",
                "prediction": self.prediction,
                "without LoRA": self._hash_of_frozen(),
                "prompts": tensors_hash({"embeddings": self.embeddings}),
            },
            "modules": hashlib.sha256(json.dumps([layers, scales]).encode()).hexdigest(),
        }

    def _hash_of_frozen(self) -> str:
        """Of the weights that are not LoRA's; computed again when one of them was written to or moved."""
        frozen = {name: p for name, p in self.named_parameters() if not is_lora(name)}
        versions = [(p.data_ptr(), p.dtype, p._version) for p in frozen.values()]
        if self._frozen_hash is None or self._frozen_hash[0] != versions:
            self._frozen_hash = versions, tensors_hash(frozen)
        return self._frozen_hash[1]


def _leave_lora(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}unet.") and not is_lora(name)]:
        del state[name]


def _miss_lora_alone(module: nn.Module, keys) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if is_lora(name)]


def load(
    folder: str | os.PathLike,
    prompts: Sequence[str],
    *,
    rank: int | None = None,
    lora: str | os.PathLike | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> LatentModel:
    """A Stable Diffusion pipeline's U-Net with LoRA weights, new ones to be trained or trained ones.

    Everything comes from local folders. New weights are random from torch's state: seed torch first to get the same ones
    again. ``functools.partial(load, folder, prompts, rank=128)`` is a factory for :func:`pyattr.evaluation.build_ground_truth`.

    Args:
        folder: of a StableDiffusionPipeline, as diffusers saves it.
        prompts: n distinct ones, at least one; condition c of an image is the number of its prompt.
        rank: of new LoRA weights beside q, k, v and the output of every attention; D-TRAK takes 128. Or
        lora: trained weights: a ``.safetensors`` file as diffusers writes it, a folder with
            ``pytorch_lora_weights.safetensors``, or a folder that peft wrote.
        alpha: new weights count alpha / rank times; None: rank.
        dropout: probability behind every attention while training; D-TRAK trains with 0.1.

    Returns:
        :class:`LatentModel`, float32, on the CPU, in eval mode.

    Raises:
        TypeError, ValueError: an argument is not as above, a prompt is longer than the text encoder takes, or the pipeline or
            the weights are of a kind that this does not know; the message says which.
        FileNotFoundError: a folder or file is missing.
        ImportError: install pyattr[lora].

    Extra memory: the text encoder, while prompts are embedded; 4 L d bytes for each prompt (237 kB for Stable Diffusion 1).

    Source: Hu et al., "LoRA", ICLR 2022; Zheng et al., ICLR 2024 (D-TRAK), on ArtBench.
    """
    if isinstance(prompts, str):
        raise TypeError("latent.load: prompts must be a list of strings, got a single one")
    prompts = list(prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"latent.load: prompts must be strings, and one at least, got {prompts[:3]}")
    if len(set(prompts)) < len(prompts):
        raise ValueError("latent.load: prompts must be distinct, got one twice: index_prompts numbers those of images")
    if (rank is None) == (lora is None):
        raise ValueError("latent.load: give either rank, for new LoRA weights, or lora, for trained ones")
    if lora is not None and alpha is not None:
        raise ValueError("latent.load: alpha goes with rank; trained weights have their own")
    folder = check_folder(folder, "latent.load")
    schedule, prediction = read_schedule(folder)
    embeddings = embed_prompts(folder, [*prompts, ""], "latent.load")
    unet = load_unet(folder, "latent.load")
    width = unet.config.cross_attention_dim
    if embeddings.shape[2] != width:
        raise ValueError(
            f"latent.load: the U-Net of {folder} must take embeddings of the text encoder's width {embeddings.shape[2]}, "
            f"got {width}"
        )
    if lora is None:
        lora_weights.attach(unet, rank, alpha)
    else:
        lora_weights.read(unet, lora)
    lora_weights.set_dropout(unet, dropout)
    return LatentModel(unet, embeddings, schedule, prediction).eval()
