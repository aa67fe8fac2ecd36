"""Images to latents and back."""

import os

import torch
from torch import Tensor

from ..conditioned import Conditioned
from ..images import as_images, to_bytes, to_unit
from ..progress import Progress, silent
from ..storage import data_hash, model_hash
from ..store import FeatureDirectory
from .folder import check_folder, load_vae

_DEFINITION = 1  # of the latents; a change that moves their values by more than rounding raises it
_SHARD_ROWS = 256


class Codec:
    """The autoencoder of a pipeline: ``z = (mode of q(z | x) - shift) scale``, with the shift and scale of its configuration.

    Nothing is drawn: latents are the mode of the encoder's distribution, so that an image has the same ones each time.

    Args:
        folder: of a Stable Diffusion pipeline, as diffusers saves it; nothing is downloaded.
        batch_size: images that go through it together.
        device: where it lies.

    Raises:
        FileNotFoundError, ValueError: it is not such a folder.
        ImportError: diffusers is missing: install pyattr[models].

    Source: Rombach et al., CVPR 2022; the mode as in the published code of Zheng et al., ICLR 2024 (D-TRAK).
    """

    def __init__(self, folder: str | os.PathLike, *, batch_size: int = 8, device: torch.device | str = "cpu"):
        if batch_size < 1:
            raise ValueError(f"Codec: batch_size must be at least 1, got {batch_size}")
        self._vae = load_vae(check_folder(folder, "Codec")).to(device)
        self._batch_size = batch_size
        config = self._vae.config
        self._factor = 2 ** (len(config.block_out_channels) - 1)
        self._scale, self._shift = config.scaling_factor, config.get("shift_factor") or 0.0

    def identity(self) -> dict:
        """What decides the latents of an image."""
        return {
            "vae": model_hash(self._vae),
            "scale": self._scale,
            "shift": self._shift,
            "definition": _DEFINITION,
        }

    def latent_shape(self, images: Tensor) -> torch.Size:
        """The shape [c, H / 8, W / 8] of the latents of images [N, C, H, W].

        Raises:
            ValueError: images that the autoencoder does not take.
        """
        channels, factor = self._vae.config.in_channels, self._factor
        _, given, height, width = images.shape
        if given != channels or height % factor or width % factor or 0 in images.shape:
            raise ValueError(
                f"Codec: images must be at least one of {channels} channels with sides that are multiples of {factor}, "
                f"got shape {list(images.shape)}"
            )
        return torch.Size([self._vae.config.latent_channels, height // factor, width // factor])

    def encode(
        self,
        images,
        conditions,
        *,
        mirrored: bool = False,
        directory: str | os.PathLike | None = None,
        progress: Progress = silent,
    ) -> Conditioned:
        """The latents of images.

        Args:
            images: [N, C, H, W] uint8, or floating point in [-1, 1]; C of the autoencoder, 3, and sides that are multiples of
                its factor, 8.
            conditions: [N] integers, which prompt each goes with.
            mirrored: also the latents of the mirrored images, for ``train(..., flip=True)``.
            directory: where latents are kept as they are made, 256 images at a time, and found again.
            progress: stage "latents", counts images.

        Returns:
            :class:`~pyattr.diffusion.Conditioned`, latents [N, c, H / 8, W / 8] float32 on the CPU.

        Raises:
            TypeError, ValueError: an argument is not as above, or ``directory`` was made with others.
            DamagedFileError: what is there cannot be read.

        Extra memory: the autoencoder's for a batch; the latents twice.
        """
        images = as_images(images, "Codec", "images")
        shape = (1 + mirrored, *self.latent_shape(images))
        # What is wrong with the conditions is said before the work.
        found = Conditioned(torch.empty(len(images), *shape[1:], device="cpu"), conditions)
        total, done = len(images), 0

        def rows(start: int, end: int) -> Tensor:  # -> [R, (1 or 2) c h w]
            nonlocal done
            parts = []
            for first in range(start, end, self._batch_size):
                some = images[first : min(first + self._batch_size, end)]
                sides = [some, some.flip(3)] if mirrored else [some]
                parts.append(torch.stack([self._encode(side) for side in sides], 1).flatten(1))
                done += len(some)
                progress(done, total, "latents")
            return torch.cat(parts)

        if directory is None:
            progress(0, total, "latents")
            latents = rows(0, total)
        else:
            store = FeatureDirectory(
                directory,
                settings={**self.identity(), "mirrored": bool(mirrored)},
                data={"images": data_hash(images)},
                rows=total,
                shard_rows=_SHARD_ROWS,
            )
            todo = store.missing()
            done = total - sum(end - start for start, end in todo)
            progress(done, total, "latents")
            for start, end in todo:
                store.write(start, rows(start, end), torch.arange(start, end), self._batch_size)
            latents = store.features().tensor()
        latents = latents.unflatten(1, shape)
        other = latents[:, 1].contiguous() if mirrored else None
        return Conditioned(latents[:, 0].contiguous(), found.conditions, other)

    @torch.no_grad()
    def decode(self, latents) -> Tensor:
        """The images of latents.

        Args:
            latents: [N, c, h, w] floating point, or Conditioned, or :class:`~pyattr.diffusion.Samples`.

        Returns:
            [N, C, 8 h, 8 w] uint8 on the CPU, rounded as for an 8-bit image file.

        Raises:
            ValueError: latents of another shape.

        Extra memory: the autoencoder's for a batch.
        """
        latents = getattr(latents, "images", latents)
        channels = self._vae.config.latent_channels
        if latents.dim() != 4 or latents.shape[1] != channels:
            raise ValueError(f"Codec: latents must have shape [N, {channels}, h, w], got {list(latents.shape)}")
        height, width = (self._factor * side for side in latents.shape[2:])
        out = torch.empty(len(latents), self._vae.config.out_channels, height, width, dtype=torch.uint8, device="cpu")
        for start in range(0, len(latents), self._batch_size):
            some = latents[start : start + self._batch_size].to(self._vae.device, self._vae.dtype)
            out[start : start + len(some)] = to_bytes(self._vae.decode(some / self._scale + self._shift).sample)
        return out

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, c, h, w] float32 on the CPU
        vae = self._vae
        mode = vae.encode(to_unit(images, next(vae.parameters()))).latent_dist.mode()
        return ((mode - self._shift) * self._scale).float().cpu()
