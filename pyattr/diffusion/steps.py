"""One step of a sampler, and its derivative: but for clips affine in the image, the predicted noise and the exogenous noise."""

from dataclasses import dataclass

from torch import Tensor

from .schedule import Schedule

METHODS = ("ddim", "ddpm", "published")


@dataclass(frozen=True)
class Step:
    """``x_s = from_image x0 + from_noise e + from_x x_t + spread z`` with ``x0 = (x_t - sigma e) / signal``.

    Attributes:
        signal, sigma: sqrt(abar_t), sqrt(1 - abar_t).
        from_image, from_noise, from_x: coefficients; None where the sampler has no such term.
        spread: of the exogenous noise.
        clip_image: x0 is clipped to [-1, 1].
        clip_result: x_s is.
    """

    signal: float
    sigma: float
    from_image: float | None
    from_noise: float | None
    from_x: float | None
    spread: float
    clip_image: bool = False
    clip_result: bool = False

    def apply(self, x: Tensor, e: Tensor, z: Tensor | None = None) -> Tensor:
        """The next image.

        Args:
            x: x_t, [B, C, H, W].
            e: the predicted noise, same shape.
            z: the exogenous noise, same shape; None where none is added.

        Returns:
            x_s, [B, C, H, W].
        """
        image = None
        if self.from_image is not None:
            image = self._image(x, e)
            image = image.clamp(-1, 1) if self.clip_image else image
        out = self._sum(image, e, x)
        if z is not None:
            out = out + self.spread * z
        return out.clamp(-1, 1) if self.clip_result else out

    def tangent(self, x: Tensor, e: Tensor, z: Tensor | None, x_dot: Tensor, e_dot: Tensor) -> Tensor:
        """The derivative of :meth:`apply` along tangents of the image and of the predicted noise.

        A clip passes tangents where its argument lies in [-1, 1], and nothing elsewhere.

        Args:
            x, e, z: as in :meth:`apply`.
            x_dot, e_dot: [K, B, C, H, W].

        Returns:
            [K, B, C, H, W].
        """
        image_dot = None
        if self.from_image is not None:
            image_dot = self._image(x_dot, e_dot)
            if self.clip_image:
                image_dot = image_dot.masked_fill(self._image(x, e).abs() > 1, 0)
        out = self._sum(image_dot, e_dot, x_dot)
        if self.clip_result:
            unclipped = self._sum(None if self.from_image is None else self._image(x, e), e, x)
            if z is not None:
                unclipped = unclipped + self.spread * z
            out = out.masked_fill(unclipped.abs() > 1, 0)
        return out

    def _image(self, x: Tensor, e: Tensor) -> Tensor:
        return (x - self.sigma * e) / self.signal

    def _sum(self, image: Tensor | None, e: Tensor, x: Tensor) -> Tensor:
        terms = ((self.from_image, image), (self.from_noise, e), (self.from_x, x))
        first, *others = [scale * value for scale, value in terms if scale is not None]
        for term in others:
            first = first + term
        return first


def steps(schedule: Schedule, timesteps: list[int], *, method: str, eta: float = 0.0, clip: bool = True) -> list[Step]:
    """The steps of :func:`pyattr.diffusion.sample`, whose docstring has the formulas.

    Args:
        timesteps: those visited, falling by T div S.

    Returns:
        One :class:`Step` for each timestep. Coefficients are float64 until they meet an image.
    """
    stride = schedule.num_timesteps // len(timesteps)
    return [_step(schedule, t, t - stride, method, eta, clip) for t in timesteps]


def _step(schedule: Schedule, t: int, s: int, method: str, eta: float, clip: bool) -> Step:
    abar_t = float(schedule.alphas_cumprod[t])
    abar_s = float(schedule.alphas_cumprod[s]) if s >= 0 else 1.0
    a = abar_t / abar_s
    signal, sigma = abar_t**0.5, (1 - abar_t) ** 0.5
    if method == "published":
        spread = (a * (1 - a)) ** 0.5
        return Step(signal, sigma, None, -(1 - a) / sigma / a**0.5, a**-0.5, spread, clip_result=clip and s < 0)
    # DDPM's posterior standard deviation; DDIM's sigma at eta = 1 is the same number.
    spread = ((1 - abar_s) / (1 - abar_t) * (1 - a)) ** 0.5
    if method == "ddpm":
        image, x = abar_s**0.5 * (1 - a) / (1 - abar_t), a**0.5 * (1 - abar_s) / (1 - abar_t)
        return Step(signal, sigma, image, None, x, spread, clip_image=clip)
    spread *= eta
    return Step(signal, sigma, abar_s**0.5, (1 - abar_s - spread**2) ** 0.5, None, spread, clip_image=clip)
