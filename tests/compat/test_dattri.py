"""dattri's projections by name, scale, shape and dtype; their matrix is that of our ops, in one piece or in many."""

import sys
import types

import pytest
import torch

from pyattr import ops
from pyattr.compat import dattri
from pyattr.compat.dattri import BasicProjector, ChunkedCudaProjector, CudaProjector, random_project

CPU = torch.device("cpu")
TYPES = ("identity", "normal", "rademacher", "sjlt", "random_mask", "grass")
WIDTH, OUTPUTS = 700, 40  # grass keeps 160
SHAPES = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "scalar": (), "fc.weight": (19, 30), "rest": (17,)}


@pytest.fixture
def gradients():
    """A dict of 700 numbers per row, not all of it contiguous."""
    made = {name: torch.randn(5, *shape) for name, shape in SHAPES.items()}
    made["fc.weight"] = torch.randn(5, 30, 19).mT
    assert flat(made).shape == (5, WIDTH)
    return made


def flat(gradients):
    return torch.cat([piece.reshape(5, -1) for piece in gradients.values()], 1)


def by_hand(features, proj_type, seed=3, stream=0):
    """The definition of each type, from the public ops."""
    key = {"seed": seed, "stream": stream}
    if proj_type == "identity":
        return features
    if proj_type in ("normal", "rademacher"):
        op = ops.gaussian_project if proj_type == "normal" else ops.rademacher_project
        return op(features, OUTPUTS, **key) / OUTPUTS**0.5
    if proj_type == "sjlt":
        return ops.sparse_project(features, OUTPUTS, nonzeros=1, **key)
    if proj_type == "random_mask":
        return features[:, ops.mask_indices(WIDTH, OUTPUTS, **key)]
    return ops.sparse_project(features[:, ops.mask_indices(WIDTH, 4 * OUTPUTS, **key)], OUTPUTS, nonzeros=1, **key)


def close(found, expected, dtype=torch.float32):
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=2**-6 if dtype.itemsize == 2 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("proj_type", TYPES)
def test_a_dict_gives_what_the_flat_tensor_gives(gradients, proj_type):
    options = {"proj_dim": OUTPUTS, "proj_max_batch_size": 16, "proj_seed": 3, "proj_type": proj_type}
    whole = flat(gradients)
    close(random_project(gradients, 5, **options)(gradients), by_hand(whole, proj_type))
    close(random_project(whole, 5, **options)(whole), by_hand(whole, proj_type))


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(gradients, proj_type, dtype):
    gradients = {name: piece.to(dtype) for name, piece in gradients.items()}
    options = {"proj_dim": OUTPUTS, "proj_max_batch_size": 16, "proj_seed": 3, "proj_type": proj_type}
    found = random_project(gradients, 5, **options)(gradients)
    close(found, by_hand(flat(gradients), proj_type), dtype)
    if dtype == torch.float64:
        torch.testing.assert_close(found, by_hand(flat(gradients), proj_type), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("proj_type", TYPES[1:])
def test_scale_keeps_norms(proj_type):
    """As dattri scales: dense and sjlt keep norms in expectation, masks shorten by the share they keep."""
    features, options = torch.randn(1, WIDTH), {"proj_dim": OUTPUTS, "proj_max_batch_size": 8, "proj_type": proj_type}
    squares = [
        random_project(features, 1, proj_seed=seed, **options)(features).square().sum() / features.square().sum()
        for seed in range(100)
    ]
    share = {"random_mask": OUTPUTS / WIDTH, "grass": 4 * OUTPUTS / WIDTH}.get(proj_type, 1.0)
    squares = torch.stack(squares)
    assert abs(squares.mean() - share) < 5 * squares.std() / 10


@pytest.mark.parametrize("proj_type", TYPES[1:])
@pytest.mark.parametrize(
    "seed, member, word, stream",
    [(3, 2, 200_003, 0), (2**32 + 5, 0, 5, 1), (-1, 0, 2**32 - 1, 2**32 - 1), (2**32 - 1, 1, 99_999, 1)],
)
def test_seed_of_an_ensemble_member(proj_type, seed, member, word, stream):
    """seed + 10^5 * ensemble_id, in the two words of the key."""
    features = torch.randn(5, WIDTH)
    for kind in (BasicProjector, CudaProjector):
        projector = kind(WIDTH, OUTPUTS, seed, proj_type, CPU)
        first = projector.project(features, member)
        close(first, by_hand(features, proj_type, word, stream))
        assert not torch.equal(projector.project(features, member + 1), first)
        assert torch.equal(projector.project(features, ensemble_id=member), first)
        projector.free_memory()
        assert torch.equal(projector.project(features, member), first)


@pytest.mark.parametrize("proj_type", TYPES)
def test_the_later_signature(gradients, proj_type):
    params = types.SimpleNamespace(
        feature_batch_size=5, proj_dim=OUTPUTS, proj_max_batch_size=16, proj_seed=3, proj_type=proj_type, device=CPU
    )
    before = random_project(gradients, 5, OUTPUTS, 16, 3, proj_type, device="cpu")(gradients, 1)
    assert torch.equal(random_project(gradients, params)(gradients, 1), before)
    assert torch.equal(random_project(gradients, proj_params=params)(gradients, ensemble_id=1), before)
    with pytest.raises(TypeError, match="proj_params must come without the arguments that it holds"):
        random_project(gradients, params, OUTPUTS)


def test_positional_arguments_of_the_first_signature(gradients):
    found = random_project(gradients, 5, OUTPUTS, 16)(gradients)
    close(found, by_hand(flat(gradients), "normal", 0))  # the default seed and type


def test_what_logra_leaves_out_is_none(gradients):
    """dattri's LoGra hands None on for a proj_max_batch_size that its user did not give."""
    found = random_project(gradients, 5, proj_dim=OUTPUTS, proj_max_batch_size=None)(gradients)
    assert torch.equal(found, random_project(gradients, 5, OUTPUTS, 16)(gradients))


def test_the_batch_size_says_how_wide_the_example_is(gradients):
    """P is dattri's, entries div batch size: the parameters themselves are an example of B = 1, positions are rows."""
    parameters = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    wanted = random_project(gradients, 5, OUTPUTS, 16)(gradients)
    assert torch.equal(random_project(parameters, 1, OUTPUTS, 16)(gradients), wanted)
    positions = torch.randn(5, 4, 25)
    flat_positions = positions.flatten(0, 1)
    found = random_project(positions, 20, OUTPUTS, 16)(flat_positions)
    assert torch.equal(found, random_project(flat_positions, 20, OUTPUTS, 16)(flat_positions))


def test_grass_multipliers(gradients):
    whole = flat(gradients)

    def expected(kept):
        return ops.sparse_project(whole[:, ops.mask_indices(WIDTH, kept, seed=3)], OUTPUTS, seed=3)

    options = {"proj_dim": OUTPUTS, "proj_max_batch_size": 16, "proj_seed": 3}
    for name, kept in (("grass", 160), ("grass_2", 80), ("grass_17", 680), ("grass_18", 700), ("grass_1000", 700)):
        close(random_project(gradients, 5, proj_type=name, **options)(gradients), expected(kept))
    close(CudaProjector(WIDTH, OUTPUTS, 3, "grass", CPU, grass_multiplier=2).project(whole, 0), expected(80))
    close(BasicProjector(WIDTH, OUTPUTS, 3, "grass_2", CPU).project(whole, 0), expected(80))


def test_a_mask_of_more_than_there_is_keeps_everything_once():
    features = torch.randn(5, 30)
    projected = BasicProjector(30, 64, 0, "random_mask", CPU).project(features, 0)
    assert torch.equal(projected.sort().values, features.sort().values)


def test_the_identity_ignores_the_width(gradients):
    for proj_dim in (-1, 7):
        project = random_project(gradients, 5, proj_dim, 16, proj_type="identity")
        assert torch.equal(project(gradients), flat(gradients))


@pytest.mark.parametrize("proj_type", ["rademacher", "sjlt", "grass"])
def test_chunks_add_up(gradients, proj_type):
    """Borders within tensors, and a tensor over three chunks."""
    sizes = [1, 120, 80, 400, 99]
    projectors = [CudaProjector(size, OUTPUTS, index, proj_type, CPU) for index, size in enumerate(sizes)]
    chunked = ChunkedCudaProjector(projectors, 400, sizes, 64, CPU, torch.float32)
    pieces = flat(gradients).split(sizes, 1)
    expected = sum(projector.project(piece, 2) for projector, piece in zip(projectors, pieces, strict=True))
    close(chunked.project(flat(gradients), 2), expected)
    close(chunked.dict_project(gradients, ensemble_id=2), expected)
    chunked.free_memory()
    assert (chunked.proj_dim, chunked.proj_type) == (OUTPUTS, proj_type)
    half = ChunkedCudaProjector(projectors, 400, sizes, 64, CPU, torch.bfloat16)
    close(half.project(flat(gradients), 2), expected, torch.bfloat16)


def test_half_a_projector_is_not_half_the_accuracy():
    """float16 features and results, sums in float32: 70,000 would overflow on the way."""
    features = torch.full((1, 4096), 60000.0, dtype=torch.float16)
    for proj_type in ("normal", "rademacher", "sjlt"):
        found = BasicProjector(4096, 64, 0, proj_type, CPU, dtype=torch.float32).project(features, 0)
        wide = BasicProjector(4096, 64, 0, proj_type, CPU, dtype=torch.float64).project(features.double(), 0)
        torch.testing.assert_close(found.double(), wide, rtol=1e-4, atol=1)


@pytest.mark.parametrize("proj_type", TYPES)
def test_derivatives_reach_the_pieces(gradients, proj_type):
    leaves = {name: piece.clone().requires_grad_() for name, piece in gradients.items()}
    project = random_project(leaves, 5, OUTPUTS, 16, 3, proj_type)
    weights = torch.randn(5, WIDTH if proj_type == "identity" else OUTPUTS)
    bars = torch.autograd.grad((project(leaves) * weights).sum(), list(leaves.values()))
    whole = flat(gradients).requires_grad_()
    [expected] = torch.autograd.grad((by_hand(whole, proj_type) * weights).sum(), whole)
    close(torch.cat([bar.reshape(5, -1) for bar in bars], 1), expected)


@pytest.mark.parametrize("proj_type", TYPES)
def test_pieces_of_several_dtypes_keep_their_digits(gradients, proj_type):
    gradients["conv.weight"] = gradients["conv.weight"].half()
    projector = BasicProjector(WIDTH, OUTPUTS, 3, proj_type, CPU)
    close(projector.project(gradients, 0), by_hand(flat(gradients), proj_type))


def test_no_rows():
    for proj_type in TYPES[1:]:
        assert BasicProjector(WIDTH, OUTPUTS, 0, proj_type, CPU).project(torch.empty(0, WIDTH), 0).shape == (0, OUTPUTS)


def test_a_dict_is_never_put_together(gradients, monkeypatch):
    """The memory that dattri's dict input costs: one more copy of all gradients."""

    def forbidden(*arguments, **options):
        raise AssertionError("concatenated")

    monkeypatch.setattr(torch, "cat", forbidden)
    for proj_type in TYPES[1:]:
        random_project(gradients, 5, OUTPUTS, 16, 3, proj_type)(gradients)


def test_attributes():
    projector = BasicProjector(WIDTH, OUTPUTS, 7, "sjlt", "cpu", block_size=9, dtype=torch.float64, ensemble_id=2)
    assert (projector.feature_dim, projector.proj_dim, projector.seed) == (WIDTH, OUTPUTS, 7)
    assert (projector.device, projector.dtype) == (CPU, torch.float64)
    assert (projector.block_size, projector.ensemble_id) == (9, 2)
    assert projector.proj_type is dattri.ProjectionType.sjlt
    assert CudaProjector(9, 2, 0, dattri.ProjectionType.grass, CPU).grass_multiplier == 4


def test_our_seeds_are_not_those_of_another_library():
    assert "dattri" not in sys.modules  # these tests run without it


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda g: random_project(g, 5),
            TypeError,
            "random_project: feature_batch_size and proj_dim, or proj_params, must be given",
        ),
        (lambda g: random_project(g, 4, 8, 8), ValueError, r"feature_batch_size must divide shape \[5\], got 4"),
        (lambda g: random_project(g, 0, 8, 8), ValueError, "feature_batch_size must lie in .*, got 0"),
        (
            lambda g: random_project([1.0], 1, 8, 8),
            TypeError,
            "feature must be a tensor or a dict of tensors, got list",
        ),
        (
            lambda g: random_project(g, 5, 8, 8)(torch.ones(5, 700).numpy()),
            TypeError,
            "features must be a tensor or a dict of tensors, got ndarray",
        ),
        (
            lambda g: random_project(torch.ones(5, 7, dtype=torch.int64), 5, 8, 8),
            TypeError,
            "dtype must be a floating-point torch.dtype, got torch.int64",
        ),
        (lambda g: random_project({}, 5, 8, 8), ValueError, "random_project: feature must hold at least one tensor"),
        (lambda g: random_project(g, 5, 8, 8, device="meta"), ValueError, "device must be 'cpu' or 'cuda', got meta"),
        (
            lambda g: random_project(g, 5, 8, 8, proj_type="fjlt"),
            ValueError,
            "proj_type must be one of 'identity', 'normal', .*'grass' or 'grass_N', got 'fjlt'",
        ),
        (lambda g: random_project(g, 5, 8, 8, proj_type="grass_x"), ValueError, "or 'grass_N', got 'grass_x'"),
        (
            lambda g: random_project(g, 5, 8, 8, proj_type="grass_0"),
            ValueError,
            "grass_multiplier must lie in .*, got 0",
        ),
        (lambda g: random_project(g, 5, 0, 8), ValueError, r"proj_dim must lie in \[1, 2147483648\], got 0"),
        (lambda g: random_project(g, 5, 8, 8, 2**64), ValueError, "seed must lie in"),
        (lambda g: random_project(g, 5, 8, 8, 0.5), TypeError, "seed must be an integer, got float"),
        (lambda g: random_project(g, 5, 8, 8)(g, -1), ValueError, "ensemble_id must lie in"),
        (
            lambda g: random_project(g, 5, 8, 8)(torch.ones(5, 699)),
            ValueError,
            "features must have 700 numbers per row, got 699",
        ),
        (
            lambda g: random_project(g, 5, 8, 8)(torch.ones(5, 7, 100)),
            ValueError,
            r"features must have shape \[B, P\], got \[5, 7, 100\]",
        ),
        (
            lambda g: random_project(g, 5, 8, 8)({**g, "rest": torch.ones(4, 17)}),
            ValueError,
            r"features must all have the same number of rows, got \[4, 5\]",
        ),
        (lambda g: ChunkedCudaProjector([], 1, [], 1, CPU, torch.float32), ValueError, "got 0 projectors for 0 chunks"),
        (
            lambda g: ChunkedCudaProjector([CudaProjector(9, 2, 0, "identity", CPU)], 9, [9], 1, CPU, torch.float32),
            ValueError,
            "the identity has no sum over chunks",
        ),
        (
            lambda g: ChunkedCudaProjector(
                [CudaProjector(9, 2, 0, "sjlt", CPU)], 9, [9], 1, CPU, torch.float32
            ).project(g, 0),
            TypeError,
            "only accepts Tensor inputs",
        ),
        (
            lambda g: ChunkedCudaProjector(
                [CudaProjector(9, 2, 0, "sjlt", CPU)], 9, [9], 1, CPU, torch.float32
            ).dict_project(g, 0),
            ValueError,
            "features must have 9 numbers per row as in dim_per_chunk, got 700",
        ),
    ],
)
def test_errors(gradients, call, error, message):
    with pytest.raises(error, match=message):
        call(gradients)
