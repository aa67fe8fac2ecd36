"""Whole-model features of a 35M-parameter U-Net, images to [B, 4096], beside forming the gradients first; with peak memory.

``python -m bench.bench_unet_features ROW`` runs one contender once and prints the MiB that it took at most.
"""

import functools
import sys
import time

import pytest
import torch

from bench.bench_gradients import Setting, by_vmap, denoising
from bench.contenders import Here, Worker, process
from bench.figures import Goal, lead
from bench.memory import peak_mib, print_peak
from pyattr import ops
from pyattr.gradients import project_gradients

TABLE, SEED, PROJ_DIM = "unet_features", 5, 4096
COLUMN = "CIFAR U-Net, B=8, T=2"
PART, BLOCK = 40, 4  # of TRAK's columns a fortieth is timed, four at a time: 0.6 GB of its matrix


@functools.cache
def setting() -> Setting:
    """The U-Net of DDPM and D-TRAK for CIFAR-10: attention at 16 x 16 there, at the lowest resolution here."""
    return Setting((128, 256, 256, 256), 32, 3, 8, steps=2, layers=2)


def ours(kind: str) -> torch.Tensor:
    return project_gradients(setting().unet, denoising, setting().data, PROJ_DIM, kind=kind, seed=SEED, memory=4 << 30)


def formed() -> torch.Tensor:
    """[B, P] by vmap(grad), each parameter flattened."""
    return torch.cat([g.flatten(1) for g in by_vmap(setting()).values()], 1)


def then_dense() -> torch.Tensor:
    return ops.rademacher_project(formed(), PROJ_DIM, seed=SEED)


OURS = {f"pyattr project_gradients, {kind}": kind for kind in ("rademacher", "multisketch", "sparse")}
DENSE = "torch.func vmap(grad), then pyattr rademacher_project"
TRAK = "torch.func vmap(grad), then TRAK BasicProjector"
ROWS = [*OURS, DENSE, TRAK]


class Extrapolated:
    """vmap(grad), and TRAK's projector on a fortieth of its columns, in which it is linear, times forty."""

    device = "cpu"

    def __init__(self, worker: Worker):
        self.worker = worker
        self.about: dict = {}

    def first(self):
        started = time.perf_counter()
        self.worker.inputs = formed()
        seconds = time.perf_counter() - started
        answer, projecting = self.worker.first()
        self.about = self.worker.about
        return answer, seconds + PART * projecting

    def round(self) -> float:
        started = time.perf_counter()
        formed()
        return time.perf_counter() - started + PART * self.worker.round()


FIRST = next(iter(OURS))
GOALS = [
    Goal(TABLE, "dense: at least 30 times vmap(grad) and TRAK's BasicProjector", lead(FIRST, TRAK, COLUMN), 30),
    Goal(TABLE, "dense: at least 1.5 times vmap(grad) and our own dense projection", lead(FIRST, DENSE, COLUMN), 1.5),
]


@functools.cache
def flat_ends() -> torch.Tensor:
    """The flat gradients of the first and the last image, by definition.  # [2, P]"""
    rows = []
    for part in (slice(0, 1), slice(-1, None)):
        data = {name: tensor[part] for name, tensor in setting().data.items()}
        grads = torch.autograd.grad(denoising(setting().unet, data).mean(), list(setting().unet.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def check(row: str):
    def run(answer):
        if row == TRAK:
            assert answer.shape == (setting().batch, PROJ_DIM // PART)
            return
        project = getattr(ops, f"{OURS.get(row, 'rademacher')}_project")
        wanted = project(flat_ends(), PROJ_DIM, seed=SEED)
        error = ((answer[[0, -1]] - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()
        assert error < 1e-4, f"differs from the definition by {error:.2g} of its norm"

    return run


@pytest.mark.parametrize("row", ROWS)
def test_unet_features(row, measure, leave_out, peer_python):
    if row == TRAK:
        if peer_python is None:
            leave_out(TABLE, row, COLUMN, "the peers' environment is missing or left out: run `python -m bench.peers`")
        worker = Worker(
            "trak", torch.empty(0), process(peer_python, {}), proj_dim=PROJ_DIM // PART, kind="rademacher", seed=SEED,
            block_size=BLOCK,
        )  # fmt: skip
        contender = Extrapolated(worker)
        note = (
            "projector timed on a fortieth of its columns, four at a time (it is linear in them); peak memory with four"
        )
    else:
        contender, note = Here(functools.partial(ours, OURS[row]) if row in OURS else then_dense), ""
    measure(
        contender,
        check=check(row),
        table=TABLE,
        row=row,
        column=COLUMN,
        ours=row in OURS,
        kind=OURS.get(row, "rademacher"),
        work=setting().batch * setting().steps,
        unit="images through the network",
        bytes=4 * setting().parameters + 4 * setting().batch * PROJ_DIM,
        note=note,
        rounds=3,
        extra={"parameters": setting().parameters, **peak_mib("bench_unet_features", row)},
    )


def main(row: str):
    denoising(setting().unet, setting().data)  # what a first forward pass loads and keeps is no contender's
    if row == TRAK:
        # In this process: what its block of the matrix takes, beside the gradients.
        print_peak(lambda: formed() @ torch.randint(0, 2, (setting().parameters, BLOCK)).float())
    else:
        print_peak(functools.partial(ours, OURS[row]) if row in OURS else then_dense)


if __name__ == "__main__":
    main(*sys.argv[1:])
