import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattr.attribution.float32_kernel import Float32Kernel
from pyattr.attribution.kernel import DampedKernel, balanced_lambda, choose_lambda, effective_dimension
from pyattr.attribution.probed_das import CrossKernel
from pyattr.diffusion.features import Features


def kernel(phi):
    return DampedKernel(Features.from_tensor(phi, torch.arange(len(phi))))


def by_definition(queries, phi, lambda_):
    queries, phi = queries.double(), phi.double()
    gram = phi.T @ phi
    return queries @ torch.linalg.inv(gram + lambda_ * torch.eye(len(gram), dtype=torch.float64)) @ phi.T


def test_by_hand():
    """Phi = diag(1, 2), lambda = 1: (G + I)^-1 = diag(1/2, 1/5)."""
    scores = kernel(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).scores(torch.tensor([[3.0, 5.0]]), 1.0)
    torch.testing.assert_close(scores, torch.tensor([[1.5, 2.0]]))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 4), st.floats(-3, 3), st.integers(0, 99))
def test_both_forms_are_the_definition(count, dim, num_queries, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    queries = torch.randn(num_queries, dim, generator=generator, dtype=torch.float64)
    lambda_ = 10.0**exponent
    made = kernel(phi)
    assert made.dual == (count < dim)
    assert len(made.eigenvalues) == min(count, dim)
    scores = made.scores(queries, lambda_)
    assert scores.dtype == torch.float32 and scores.shape == (num_queries, count)
    expected = by_definition(queries, phi, lambda_)
    torch.testing.assert_close(scores.double(), expected, atol=1e-6 * (1 + float(expected.abs().sum())), rtol=1e-6)


@pytest.mark.parametrize("dim", [30, 150])  # primal, dual
def test_blocks_on_disk_change_nothing(monkeypatch, dim):
    monkeypatch.setattr("pyattr.attribution.kernel._COLUMNS", 64)  # several pieces of the columns too
    phi, queries = torch.randn(100, dim), torch.randn(7, dim)
    pieces = phi.split(33)
    starts = [0, 33, 66, 99]
    blocks = Features(torch.arange(100), dim, torch.float32, lambda start: pieces[start // 33], starts)
    scores = DampedKernel(blocks).scores(queries, 10.0)
    torch.testing.assert_close(scores.double(), by_definition(queries, phi, 10.0), atol=1e-4, rtol=1e-4)


def test_a_dominant_direction_leaves_the_others_resolved():
    """Eigenvalues 1e9 and about 1, lambda 0.1: float32 would see only the first."""
    common = torch.ones(20, 1, dtype=torch.float64) * torch.randn(1, 40, dtype=torch.float64) * 1e3
    phi = common + 0.1 * torch.randn(20, 40, dtype=torch.float64)
    queries = common[:2] + 0.1 * torch.randn(2, 40, dtype=torch.float64)
    expected = by_definition(queries, phi, 0.1)
    torch.testing.assert_close(kernel(phi).scores(queries, 0.1).double(), expected, atol=1e-4, rtol=1e-3)


def test_eigenvalues_fall_and_are_those_of_the_gram_matrix():
    phi = torch.randn(6, 9, dtype=torch.float64)
    expected = torch.linalg.svdvals(phi) ** 2
    torch.testing.assert_close(kernel(phi).eigenvalues, expected)
    torch.testing.assert_close(kernel(phi.T.contiguous()).eigenvalues, expected)


def test_effective_dimension_is_the_sum_of_leverages():
    phi = torch.randn(6, 9, dtype=torch.float64)
    leverages = by_definition(phi, phi, 2.5).diagonal().sum()
    assert effective_dimension(kernel(phi).eigenvalues, 2.5) == pytest.approx(float(leverages), rel=1e-12)
    assert effective_dimension(torch.tensor([3.0, 1.0]), 1.0) == pytest.approx(1.25)


def test_features_that_are_not_finite_are_refused():
    phi = torch.randn(4, 3)
    phi[2, 1] = torch.nan
    with pytest.raises(ValueError, match="values that are not finite"):
        kernel(phi)


def test_automatic_lambda_by_hand():
    """Equal eigenvalues w have w / (w + lambda) = 1/4 at lambda = 3 w, and those that are rounding do not count."""
    assert balanced_lambda(torch.full((5,), 2.0, dtype=torch.float64)) == pytest.approx(6.0)
    assert balanced_lambda(torch.tensor([4.0, 4.0, 1e-17, 0.0], dtype=torch.float64)) == pytest.approx(12.0)
    # 9 / (9 + l) + 1 / (1 + l) = 1/2 is l^2 - 10 l - 27 = 0.
    assert balanced_lambda(torch.tensor([9.0, 1.0], dtype=torch.float64)) == pytest.approx(5 + 52**0.5)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(1e-3, 1e3))
def test_automatic_lambda_leaves_a_quarter_and_scales_with_the_features(values, scale):
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    lambda_ = balanced_lambda(eigenvalues)
    assert effective_dimension(eigenvalues, lambda_) == pytest.approx(len(values) / 4, rel=1e-9)
    assert balanced_lambda(eigenvalues * scale) == pytest.approx(lambda_ * scale, rel=1e-9)


def test_one_dominant_eigenvalue_does_not_decide():
    rest = torch.linspace(1, 3, 100, dtype=torch.float64)
    alone, together = balanced_lambda(rest), balanced_lambda(torch.cat([torch.tensor([1e9]).double(), rest]))
    assert together == pytest.approx(alone, rel=0.1)


def test_lambda_given_wins_and_a_grid_gives_its_nearest():
    eigenvalues = torch.full((5,), 2.0, dtype=torch.float64)  # the automatic lambda is 6
    assert choose_lambda(eigenvalues, 0.125) == 0.125
    assert choose_lambda(eigenvalues, None) == pytest.approx(6.0)
    assert choose_lambda(eigenvalues, [0.1, 1, 10, 100]) == 10  # 6 is nearer to 10 than to 1 on a logarithmic scale
    assert choose_lambda(eigenvalues, (2.0, 20.0)) == 2.0


def test_no_positive_eigenvalue():
    with pytest.raises(ValueError, match="every feature of the training images is zero"):
        balanced_lambda(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("count", [4, 30])  # dual, primal
def test_remainders_are_what_the_hat_matrix_leaves_of_one(count):
    phi = torch.randn(count, 9, dtype=torch.float64)
    made = kernel(phi)
    for lambda_ in (0.1, 5.0):
        hat = by_definition(phi, phi, lambda_)
        torch.testing.assert_close(1 - made.remainders(lambda_), hat.diagonal(), rtol=1e-10, atol=1e-12)
        told = float((1 - made.remainders(lambda_)).sum())
        assert told == pytest.approx(effective_dimension(made.eigenvalues, lambda_))


def test_remainders_keep_their_digits_at_small_lambda():
    """Fewer samples than columns: lambda (K + lambda)^-1 with lambda 10^-18 times the largest eigenvalue."""
    phi = torch.randn(12, 40, dtype=torch.float64)
    made = kernel(phi)
    lambda_ = 1e-18 * float(made.eigenvalues[0])
    expected = lambda_ * torch.linalg.inv(phi @ phi.T).diagonal()
    torch.testing.assert_close(made.remainders(lambda_), expected, rtol=1e-10, atol=0)
    # By hand: K = diag(1, 4), and at lambda = 1e-20 they are 1e-20 / (w + 1e-20).
    found = kernel(torch.tensor([[1.0, 0, 0], [0, 0, 2]])).remainders(1e-20)
    torch.testing.assert_close(found, torch.tensor([1e-20, 2.5e-21], dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_sample_alone_in_its_direction_has_a_remainder_above_rounding():
    """More samples than columns, where h is taken from 1: the first sample alone has the first column."""
    phi = torch.randn(30, 4, dtype=torch.float64)
    phi[:, 0] = 0
    phi[0] = torch.tensor([3.0, 0, 0, 0])
    for lambda_ in (1e-3, 1e-12, 1e-17):
        found = kernel(phi).remainders(lambda_)
        assert float(found[0]) == pytest.approx(lambda_ / (9 + lambda_), rel=1e-3 if lambda_ == 1e-12 else 1e-9)
        assert (found > 0).all() and (found <= 1).all()


@pytest.mark.parametrize("count", [4, 30])
def test_eigenvalues_that_are_rounding_have_no_leverages(count):
    phi = torch.randn(count, 9, dtype=torch.float64)
    phi[1:, :] = phi[1, :]  # of rank two
    made = kernel(phi)
    largest = float(made.eigenvalues[0])
    assert torch.isfinite(made.remainders(1e-10 * largest)).all()
    with pytest.raises(ValueError, match=r"attribution: lambda_ must be at least .* for leverages, .* got 1e-20"):
        made.remainders(1e-20)


# The published arithmetic


@pytest.mark.parametrize("count", [4, 30])
def test_float32_inverses_agree_where_float32_resolves_them(count):
    phi, queries = torch.randn(count, 9), torch.randn(3, 9)
    single, double = Float32Kernel(Features.from_tensor(phi, torch.arange(count))), kernel(phi)
    for lambda_ in (0.5, 20.0):
        expected = by_definition(queries, phi, lambda_)
        torch.testing.assert_close(single.scores(queries, lambda_).double(), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(single.remainders(lambda_), double.remainders(lambda_), rtol=1e-3, atol=1e-4)
    norms = double.solution_norms([0.5, 20.0])
    torch.testing.assert_close(single.solution_norms([0.5, 20.0]), norms, rtol=1e-3, atol=1e-4)
    divided = torch.stack([*single.grid(queries, [0.5, 20.0], norms)])
    assert torch.equal(divided[1], (single.scores(queries, 20.0) / norms[1]).float())
    assert torch.equal(single.eigenvalues, double.eigenvalues)


def test_float32_inverses_are_the_published_expression_and_collapse_below_its_resolution():
    """Fewer samples than columns and one direction that all share: at small lambda the inverse is noise."""
    phi = 300 + torch.randn(20, 60)
    queries = phi[:5] + 0.1 * torch.randn(5, 60)
    made = Float32Kernel(Features.from_tensor(phi, torch.arange(20)))
    gram = phi.T @ phi
    errors = []
    for lambda_ in (1e-2, 1e3):
        scores = made.scores(queries, lambda_)
        assert torch.equal(scores, queries @ torch.linalg.inv(gram + lambda_ * torch.eye(60)) @ phi.T)
        exact = by_definition(queries, phi, lambda_)
        torch.testing.assert_close(kernel(phi).scores(queries, lambda_).double(), exact, rtol=1e-3, atol=1e-3)
        errors.append(float((scores - exact).norm() / exact.norm()))
    assert errors[0] > 1 and errors[1] < 0.05


class Streamed(Features):
    """Features that nobody may have in memory as a whole."""

    def tensor(self):
        raise AssertionError("all rows are asked for at once")


def streamed(phi, size):
    pieces = phi.split(size)
    return Streamed(
        torch.arange(len(phi)),
        phi.shape[1],
        phi.dtype,
        lambda start: pieces[start // size],
        [*range(0, len(phi), size)],
    )


def test_float32_inverses_read_blocks():
    phi, queries = torch.randn(100, 9), torch.randn(3, 9)
    whole, blocks = Float32Kernel(Features.from_tensor(phi, torch.arange(100))), Float32Kernel(streamed(phi, 33))
    norms = whole.solution_norms([0.5, 20.0])
    torch.testing.assert_close(blocks.solution_norms([0.5, 20.0]), norms, rtol=1e-4, atol=0)
    torch.testing.assert_close(blocks.remainders(0.5), whole.remainders(0.5), rtol=1e-4, atol=1e-5)
    for one, other in zip(
        blocks.grid(queries, [0.5, 20.0], norms), whole.grid(queries, [0.5, 20.0], norms), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dim", [6, 60])  # of the matrix: fewer than its rows, and more
def test_samples_apart_from_the_matrix_are_read_in_blocks(dim):
    generator = torch.Generator().manual_seed(3)
    rows, phi = (torch.randn(count, dim, generator=generator, dtype=torch.float64) for count in (20, 100))
    queries = torch.randn(2, 5, dim, generator=generator, dtype=torch.float64)
    halves = [Features.from_tensor(part, torch.arange(10)) for part in (2 * rows[:10], 2 * rows[10:])]
    joined = Features.joined(halves, 0.5)
    assert torch.equal(joined.tensor(), rows) and joined.ids.tolist() == [*range(20)]
    made = CrossKernel(joined if dim > 20 else streamed(rows, 7), streamed(phi, 33))
    assert made.dual == (dim > 20)
    lambdas = [0.3, 20.0]
    for lambda_, found in zip(lambdas, made.mean_squares(queries, lambdas), strict=True):
        inverse = torch.linalg.inv(rows.T @ rows + lambda_ * torch.eye(dim, dtype=torch.float64))
        expected = (queries @ inverse @ phi.T).square().mean(0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_a_matrix_that_float32_finds_singular_has_no_scores():
    made = Float32Kernel(Features.from_tensor(torch.tensor([[1e4, 1e4]]), torch.arange(1)))
    assert made.scores(torch.ones(2, 2), 1e-9).isnan().all()
