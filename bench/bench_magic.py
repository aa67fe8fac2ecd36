"""What MAGIC costs beside the plain training that it goes back through: one query, eight queries, all states or few."""

import functools

import numpy as np
import pytest
import torch

from bench.contenders import Here
from bench.figures import Goal
from pyattr.attribution import MAGIC
from pyattr.attribution.magic import Adam, NegativeLoss
from pyattr.diffusion import ScoreLoss, ScoreNet, VarianceExploding

TABLE, SEED, STEPS, BATCH = "magic", 5, 36, 32
COLUMN = f"ScoreNet, T={STEPS}, B={BATCH}"
PLAIN = "plain training, torch.optim.Adam"
LOSS = ScoreLoss(VarianceExploding(), mean=True)
PHI = NegativeLoss(LOSS, draws=BATCH)


def named(scheme: str, queries: int) -> str:
    return f"pyattr MAGIC, {scheme}, {queries} {'query' if queries == 1 else 'queries'}"


CASES = (("all", 1), ("all", 8), ("sqrt", 1), ("sqrt", 8), ("binomial", 1))
ROWS = {named(*case): case for case in CASES}


def at_most(row: str, times: float, other: str) -> Goal:
    """A row takes at most so many times as long as another."""

    def measured(rate):
        ours, theirs = rate(row, COLUMN), rate(other, COLUMN)
        return ours / theirs if ours and theirs else None

    return Goal(TABLE, f"{row}: at most {times} times {other}", measured, 1 / times)


GOALS = [
    at_most(named("all", 1), 4.5, PLAIN),
    at_most(named("sqrt", 1), 6, PLAIN),
    at_most(named("all", 8), 5, named("all", 1)),
    at_most(named("sqrt", 8), 4, named("sqrt", 1)),
]


@functools.cache
def network() -> ScoreNet:
    """The tutorial's, 1,115,297 parameters."""
    torch.manual_seed(SEED)
    return ScoreNet()


@functools.cache
def images() -> torch.Tensor:
    return torch.rand(4 * BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(SEED))


def method(scheme: str) -> MAGIC:
    # A fifth of the states for "binomial": what it is for.
    memory = (STEPS // 5 + 1) * 12 * sum(p.numel() for p in network().parameters())
    return MAGIC(
        network(),
        LOSS,
        PHI,
        steps=STEPS,
        batch_size=BATCH,
        optimiser=Adam(learning_rate=1e-3),
        checkpointing=scheme,
        memory=memory,
    )


def plain() -> torch.Tensor:
    """The same loss on as many items, as one would train without MAGIC; the mean loss of the last steps."""
    model = ScoreNet()
    model.load_state_dict(network().state_dict())
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    rng, losses = torch.Generator().manual_seed(SEED), []
    draws = torch.utils.data.DataLoader(range(len(images())), BATCH, shuffle=True, generator=rng)
    noise = np.random.default_rng(SEED)
    while len(losses) < STEPS:
        for items in draws:
            if len(losses) == STEPS:
                break
            loss = LOSS(model, images()[items], noise).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
    return torch.stack(losses)


def scores(scheme: str, queries: int) -> torch.Tensor:
    """Training and replay."""
    return method(scheme).fit(images()).scores(images()[:queries])


@functools.cache
def wanted() -> torch.Tensor:
    return scores("all", 8)


def check(row: str):
    def run(answer):
        if row == PLAIN:
            assert answer.shape == (STEPS,)
            assert answer[-5:].mean() < answer[:5].mean()
            return
        assert torch.equal(answer, wanted()[: len(answer)])

    return run


@pytest.mark.parametrize("row", [PLAIN, *ROWS])
def test_magic(row, measure):
    queries = 0 if row == PLAIN else ROWS[row][1]
    measure(
        Here(plain if row == PLAIN else functools.partial(scores, *ROWS[row])),
        check=check(row),
        table=TABLE,
        row=row,
        column=COLUMN,
        ours=row != PLAIN,
        work=STEPS * BATCH,
        unit="items trained on",
        bytes=4 * BATCH * STEPS * 784 * max(queries, 1),
        kind="" if row == PLAIN else row,
        rounds=3,
    )
