"""TRAK along the way that a generated image took."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..diffusion.checkpoint import identity
from ..diffusion.conditioned import Examples, check_conditions, separate, with_conditions, with_images
from ..diffusion.features import FeatureMap
from ..diffusion.guidance import Guided
from ..diffusion.images import evaluating, predict_noise, reference_parameter
from ..diffusion.sampling import Samples
from ..diffusion.storage import differences, tensors_hash
from .queries import query_ids
from .trak import TRAK


@dataclass(frozen=True)
class JourneyMap(FeatureMap):
    """The mean of gradients at the steps of a sampler, each of an image of its own.

    Args:
        visited: the timesteps, ``num_timesteps`` of them, in place of a strategy's.
    """

    visited: tuple[int, ...] = ()

    def timesteps(self) -> Tensor:
        return torch.tensor(self.visited, dtype=torch.int64)

    def batch(self, model: nn.Module, images: Examples, ids: Tensor, **limits) -> Tensor:
        """As :meth:`FeatureMap.batch`, for the images of all steps one after the other among the channels: [B, K C, H, W]."""
        steps = separate(images)[0].unflatten(1, (self.num_timesteps, -1))
        return super().batch(model, with_images(images, steps), ids, **limits)


class JourneyTRAK(TRAK):
    """Which training images lower the loss along the way from noise to a generated image.

    Scores, sign, lambda and training side are those of :class:`TRAK`. A query's feature averages over the S steps of its
    sampler: at step i, timestep t_i, the model's prediction of the final image,

        x0_i = clip((x_{t_i} - sqrt(1 - abar_{t_i}) e(x_{t_i}, t_i)) / sqrt(abar_{t_i}), -1, 1),

    (without the clip where the model works on latents, which have no range; with e guided where the samples were)
    is noised anew to t_i, and the gradient of the loss taken there, not at x_{t_i}. This is the convention of the published
    evaluation of D-TRAK.

    Args, attributes, errors: as in :class:`TRAK`. ``num_timesteps`` and ``strategy`` are those of the training images.

    Queries are :class:`~pyattr.diffusion.Samples` made with ``record="trajectory"`` by the model that was fitted; plain images
    have no journey and are refused. The predictions x0_i are made again from the trajectory, one forward pass for each step,
    and kept for the last queries.

    Extra memory of ``scores``: that of :meth:`TRAK.scores`, and the trajectory once more.

    Source: Georgiev et al., "The Journey, Not the Destination: How Data Guides Diffusion Models", arXiv 2312.06205; its form
    here, as in the code of Zheng et al., ICLR 2024 (D-TRAK).
    """

    _predicted: tuple[str, Tensor] | None = None  # of the last queries

    def _asked(self, queries, ids) -> tuple[Examples, Tensor, FeatureMap]:
        if not isinstance(queries, Samples):
            raise TypeError(
                f"JourneyTRAK: queries must be Samples with their trajectory, from sample(record='trajectory'), "
                f"got {type(queries).__name__}"
            )
        if queries.trajectory is None:
            raise ValueError(
                "JourneyTRAK: queries must keep their trajectory: make them with sample(record='trajectory')"
            )
        # Which parameters take a gradient changes no sample.
        own = {name: value for name, value in identity(self.model).items() if name != "frozen"}
        own["schedule"] = dataclasses.asdict(self.feature_map.schedule)
        differ = differences({name: queries.settings.get(name) for name in own}, own)
        if differ:
            raise ValueError(f"JourneyTRAK: queries were made by another model or schedule: {differ}")
        check_conditions(self.model, with_conditions(queries.images, queries.conditions), "JourneyTRAK", "queries")
        visited = tuple(queries.timesteps.tolist())
        fields = {field.name: getattr(self.query_map, field.name) for field in dataclasses.fields(self.query_map)}
        journey = JourneyMap(**{**fields, "num_timesteps": len(visited)}, visited=visited)
        record = {"trajectory": queries.trajectory, "timesteps": queries.timesteps}
        if queries.conditions is not None:
            record |= {
                "conditions": queries.conditions,
                "guidance": torch.tensor(queries.settings.get("guidance", 1.0), device="cpu"),
            }
        key = tensors_hash(record)
        if self._predicted is None or self._predicted[0] != key:
            self._predicted = key, self._predictions(queries)
        predicted = with_conditions(self._predicted[1], queries.conditions)
        return predicted, query_ids(queries, ids, len(queries)), journey

    @torch.no_grad()
    def _predictions(self, queries: Samples) -> Tensor:
        """The x0 of each step, the steps one after the other among the channels: [Q, S C, H, W] on the CPU."""
        schedule, like = self.feature_map.schedule, reference_parameter(self.model, "JourneyTRAK")
        steps = queries.trajectory[:, :-1]  # [Q, S, C, H, W]
        out = torch.empty(steps.shape, dtype=like.dtype, device="cpu")
        model, conditions, latents = self.model, queries.conditions, getattr(self.model, "latents", False)
        if "guidance" in queries.settings:
            model = Guided(model, queries.settings["guidance"])
        with evaluating(self.model):
            for rows in torch.arange(len(steps)).split(self.batch_size):
                for number, t in enumerate(queries.timesteps.tolist()):
                    abar = float(schedule.alphas_cumprod[t])
                    x = steps[rows, number].to(like)  # [B, C, H, W]
                    told = () if conditions is None else (conditions[rows].to(like.device),)
                    e = predict_noise(model, x, torch.full((len(x),), t, device=like.device), *told)
                    x0 = (x - (1 - abar) ** 0.5 * e) / abar**0.5
                    out[rows, number] = (x0 if latents else x0.clamp(-1, 1)).cpu()
        return out.flatten(1, 2)
