"""The derivative of a sample with respect to the weights of the members that made it.

With x_t the image, e = sum_i v_i f_i(x_t, t) the predicted noise, and D_k, E_k their derivatives along v_k,

    E_k = f_k(x_t, t) + sum_i v_i J_{f_i}(x_t, t) D_k,        D_k = 0 at the start,

and each step of the sampler, affine in x and e but for its clips, carries (D_k, E_k) to the next D_k: for the published one
D_k <- (D_k - (1 - a) / sqrt(1 - abar_t) E_k) / sqrt(a). The exogenous noise has no part in it. A clip passes the derivative of
the pixels within [-1, 1] and stops that of the others, of x0 inside a step as of the last image.

Source: Dai, Gifford, "Training Data Attribution for Diffusion Models", arXiv 2306.02174, section 4, for the published sampler.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion.images import predict_noise
from ..diffusion.progress import Pace
from ..diffusion.sampling import HELD, SAVE_SECONDS
from ..diffusion.storage import save_tensors
from ..jvp import dual_forward
from .encoded_samples import Replay


def jacobian(replay: Replay, tangents_per_pass: int) -> Tensor:
    """J of all samples.

    Args:
        replay: the samples.
        tangents_per_pass: directions that go through a member together, at most.

    Returns:
        [Q, C H W, n] float32, of pixels in [0, 1].
    """
    samples, count = replay.samples, len(replay.members)
    out = torch.empty(len(samples), samples.images.shape[1:].numel(), count, **HELD)

    def make(batch: slice, settings: dict, unfinished: Path | None, told) -> Tensor:
        return _batch(replay, batch, tangents_per_pass, settings, unfinished, told)

    for batch, columns in replay.batches("jacobian", len(samples), len(replay.sampler.steps), {}, make):
        out[batch] = columns
    return out


@torch.no_grad()
def _batch(
    replay: Replay, batch: slice, tangents_per_pass: int, settings: dict, unfinished: Path | None, told
) -> Tensor:  # -> [B, D, n]
    sampler, exogenous = replay.sampler, replay.samples.noise[batch]
    x = sampler.place(exogenous[:, 0])
    x_dot = torch.zeros(len(replay.members), *x.shape, dtype=x.dtype, device=x.device)  # [n, B, C, H, W]
    found = replay.state(unfinished, settings)
    first = 0
    if found is not None:
        tensors, first = found
        x, x_dot = (sampler.place(tensors[name]) for name in ("x", "x_dot"))
        del tensors, found  # or the old tangents would lie beside the new ones
    wide = torch.promote_types(x.dtype, torch.float32)  # of the sums over members, as in a Mixture
    pace = Pace(SAVE_SECONDS)
    told(first * len(x))
    for number, step in enumerate(sampler.steps[first:], first):
        times = sampler.times(number, len(x))
        e, e_dot = (torch.zeros_like(like, dtype=wide) for like in (x, x_dot))
        for i, (member, weight) in enumerate(zip(replay.members, replay.weights.tolist(), strict=True)):
            if number == 0 or weight == 0:  # at the start the image depends on no weight
                prediction = predict_noise(member, x, times)
            else:
                prediction = _add_tangents(e_dot, weight, member, x, x_dot, times, tangents_per_pass)
            if weight != 0:  # one of weight 0 has no part in the image, not even where it predicts NaN
                e += weight * prediction
            e_dot[i] += prediction
        e, e_dot = e.to(x.dtype), e_dot.to(x.dtype)
        z = sampler.place(exogenous[:, number + 1]) if number + 1 < exogenous.shape[1] else None
        x, x_dot = step.apply(x, e, z), step.tangent(x, e, z, x_dot, e_dot)
        if number + 1 < len(sampler.steps):
            if unfinished is not None and pace.due():
                with pace.saving():
                    record = {"kind": "unfinished jacobian", "steps": number + 1, "settings": settings}
                    save_tensors(unfinished, {"x": x, "x_dot": x_dot}, record)
            told((number + 1) * len(x))
    # From [-1, 1] to [0, 1] halves it.
    return x_dot.flatten(2).permute(1, 2, 0).float().cpu() / 2


def _add_tangents(
    e_dot: Tensor, weight: float, member: nn.Module, x: Tensor, x_dot: Tensor, times: Tensor, tangents_per_pass: int
) -> Tensor:
    """``e_dot += v_i J_{f_i} x_dot``; the member's prediction."""
    for start in range(0, len(x_dot), tangents_per_pass):
        rows = slice(start, start + tangents_per_pass)
        prediction, change = dual_forward(member, x, x_dot[rows], times)
        e_dot[rows] += weight * change
    return prediction
