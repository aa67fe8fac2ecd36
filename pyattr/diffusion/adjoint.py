"""Derivatives of the integral along the probability flow, by an equation that is solved backwards in time."""

import numpy as np
import scipy.integrate
import torch
from torch import Tensor

from .flow import Flow, Solver, runge_kutta, step_times


def integral_by_adjoint(flow: Flow, solver: Solver, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The noise that x becomes and the integral of the divergence, differentiable in x and the parameters.

    With v the velocity, a(1) the derivative of what is wanted in the noise, and c the one in the integral,

        da/dt = -(a . dv/dx + c d(div v)/dx),    dg/dt = -(a . dv/dtheta + c d(div v)/dtheta),

    from t = 1 back to the start, where a is the derivative in x and g the one in theta. The path x(t) is solved
    backwards beside them.

    Args:
        parameters: tensors that require a gradient.

    Returns:
        [B, *shape], and [B] float64.
    """
    end, integral = _Adjoint.apply(flow, solver, x, *parameters)
    return end, integral


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flow: Flow, solver: Solver, x: Tensor, *parameters: Tensor):
        end, integral = flow.forward(x.detach(), solver)
        ctx.flow, ctx.solver, ctx.parameters = flow, solver, parameters
        ctx.save_for_backward(end)
        return end, integral

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, to_end: Tensor, to_integral: Tensor):
        (end,) = ctx.saved_tensors
        path = _Backwards(ctx.flow, to_integral, end, ctx.parameters)
        state = path.pack(end, to_end, [torch.zeros_like(p) for p in ctx.parameters])
        state = path.solve(state, ctx.solver)
        _, slope, gradients = path.unpack(state)
        return None, None, slope, *gradients


class _Backwards:
    """The path, its adjoint and the gradient as one vector, from t = 1 to the start."""

    def __init__(self, flow: Flow, to_integral: Tensor, x: Tensor, parameters: tuple[Tensor, ...]):
        self.flow, self.to_integral, self.parameters = flow, to_integral, parameters
        self.shapes = [x.shape, x.shape, *(p.shape for p in parameters)]
        self.dtype = x.dtype

    def pack(self, x: Tensor, slope: Tensor, gradients: list[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1).to(self.dtype) for part in (x, slope, *gradients)])

    def unpack(self, state: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        parts = state.split([shape.numel() for shape in self.shapes])
        x, slope, *gradients = (part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))
        return x, slope, [g.to(p.dtype) for g, p in zip(gradients, self.parameters, strict=True)]

    def rates(self, state: Tensor, t: float) -> Tensor:
        """The state's derivative in time."""
        x, slope, _ = self.unpack(state)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            velocity, divergence = self.flow.rates_with_graph(x, t)
            pulled = (velocity * slope).sum() + (divergence * self.to_integral).sum().to(velocity)
            found = torch.autograd.grad(pulled, (x, *self.parameters), allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, (x, *self.parameters), strict=True)]
        return self.pack(velocity.detach(), -found[0], [-g for g in found[1:]])

    def solve(self, state: Tensor, solver: Solver) -> Tensor:
        if solver.name != "rk45":
            for t, h in reversed(step_times(solver)):
                state, _ = runge_kutta(self._rates_and_nothing, solver.name, state, t + h, -h)
            return state

        def right_side(t: float, numbers: np.ndarray) -> np.ndarray:
            return self.rates(torch.from_numpy(numbers).to(state), float(t)).double().cpu().numpy()

        found = scipy.integrate.solve_ivp(
            right_side,
            solver.interval[::-1],
            state.double().cpu().numpy(),
            method="RK45",
            rtol=solver.rtol,
            atol=solver.atol,
        )
        if not found.success:
            raise RuntimeError(f"log_likelihood: the solver gave up on the way back: {found.message}")
        return torch.from_numpy(found.y[:, -1]).to(state)

    def _rates_and_nothing(self, state: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return self.rates(state, t), torch.zeros((), dtype=torch.float64, device=state.device)
