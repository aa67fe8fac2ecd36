"""The derivative of a sample with respect to the members' weights, and what is built on it."""

import numpy as np
import pytest
import torch
from small_ensembles import IMAGES, SCHEDULE, Scaled, ensemble
from torch import nn

from pyattr.attribution import EncodedEnsemble
from pyattr.attribution.codes import ablation_weights
from pyattr.attribution.encoded_lists import distinct_top
from pyattr.diffusion import Schedule, unet

SAMPLERS = [
    {"method": "published"},
    {"method": "published", "clip": False},
    {"method": "published", "steps": 3},
    {"method": "ddpm"},
    {"method": "ddpm", "steps": 3, "clip": False},
    {"method": "ddim", "steps": 3},
    {"method": "ddim", "steps": 3, "eta": 0.7},
    {"method": "ddim", "steps": 3, "clip": False},
]


def by_hand(members, weights, samples, method, steps, eta=0.0, clip=True):
    """The sampler's formulas once more, differentiable; the image in [0, 1]."""
    stride = SCHEDULE.num_timesteps // steps
    noise = samples.noise.double()
    x = noise[:, 0]
    for number, t in enumerate(range((steps - 1) * stride, -1, -stride)):
        abar = SCHEDULE.alphas_cumprod[t]
        after = SCHEDULE.alphas_cumprod[t - stride] if t >= stride else torch.tensor(1.0, dtype=torch.float64)
        a = abar / after
        times = torch.full((len(x),), t)
        e = sum(weight * member(x, times) for weight, member in zip(weights, members, strict=True))
        z = noise[:, number + 1] if number + 1 < noise.shape[1] else torch.zeros_like(x)
        if method == "published":
            x = (x - (1 - a) / (1 - abar).sqrt() * e) / a.sqrt() + (a * (1 - a)).sqrt() * z
            continue
        x0 = (x - (1 - abar).sqrt() * e) / abar.sqrt()
        x0 = x0.clamp(-1, 1) if clip else x0
        spread = ((1 - after) / (1 - abar) * (1 - a)).sqrt()
        if method == "ddpm":
            x = (after.sqrt() * (1 - a) * x0 + a.sqrt() * (1 - after) * x) / (1 - abar) + spread * z
        else:
            x = after.sqrt() * x0 + (1 - after - (eta * spread) ** 2).sqrt() * e + eta * spread * z
    if method == "published" and clip:
        x = x.clamp(-1, 1)
    return (x + 1) / 2


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 0.7, -0.2]], ids=["uniform", "uneven"])
def test_jacobian_is_the_derivative(sampler, weights):
    made = ensemble()
    samples = made.sample(3, weights=weights, seed=2, **sampler)
    weights = torch.tensor([0.25] * 4 if weights is None else weights, dtype=torch.float64)
    arguments = {"steps": len(samples.timesteps), **sampler}
    torch.testing.assert_close(
        by_hand(made.members, weights, samples, **arguments), (samples.images.double() + 1) / 2, atol=1e-6, rtol=0
    )
    expected = torch.autograd.functional.jacobian(
        lambda v: by_hand(made.members, v, samples, **arguments).flatten(1), weights, vectorize=True
    )
    J = made.jacobian(samples)
    assert J.shape == (3, 16, 4) and J.dtype == torch.float32 and not J.requires_grad
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(J.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sampler", [SAMPLERS[0], SAMPLERS[3], SAMPLERS[6]], ids=str)
def test_jacobian_is_the_slope_between_samples(sampler):
    made, step = ensemble(), 3e-4
    samples = made.sample(2, seed=3, **sampler)
    J = made.jacobian(samples)
    for member in range(4):
        weights = torch.full((2, 4), 0.25, dtype=torch.float64)
        weights[0, member] -= step
        weights[1, member] += step
        low, high = (made.sample(2, seed=3, weights=row, **sampler).images.flatten(1) for row in weights)
        slope = (high - low) / (2 * step) / 2
        assert float(slope.abs().max()) > 0.05
        # Where a clip sets in between the two, the slope is neither; elsewhere float32 images leave 1e-4.
        certain = (slope - J[:, :, member]).abs() < 2e-4 + 1e-3 * slope.abs()
        assert float(certain.float().mean()) > 0.9


def test_saturated_pixels_do_not_move():
    made = ensemble()
    samples = made.sample(6, seed=1)
    saturated = (samples.images.abs() == 1).flatten(1)
    assert 0.05 < float(saturated.float().mean()) < 0.95
    moving = made.jacobian(samples).abs().amax(2) > 0
    assert torch.equal(moving, ~saturated)


def test_one_step_by_hand():
    """T = 1, beta 0.5, so abar = alpha = 0.5: x = sqrt(2) (x_T - sqrt(0.5) e), whose slope in e is -1; in [0, 1], -1/2."""
    made = ensemble(Scaled, members=2, items=2, schedule=Schedule(1, 0.5, 0.5))
    for member, (a, b) in zip(made.members, ((0.5, 1.0), (0.0, -2.0)), strict=True):
        member.a.data.fill_(a)
        member.b.data.fill_(b)
    samples = made.sample(3, clip=False)
    start = samples.noise[:, 0].flatten(1)
    expected = torch.stack([-0.5 * (0.5 * start + 1), torch.ones_like(start)], 2)
    torch.testing.assert_close(made.jacobian(samples), expected)
    mean = 0.25 * start - 0.5
    torch.testing.assert_close(samples.images.flatten(1), 2**0.5 * start - mean)


def test_jacobian_is_exact_where_the_image_is_linear_in_the_weights():
    """Members that predict a constant: guessed and true counterfactuals agree for any item, of whatever weight."""
    made = ensemble(Scaled, members=5)
    for member in made.members:
        member.a.data.zero_()
    samples = made.sample(2, clip=False)
    codes = [0b00001, 0b00111, 0b01111, 0b10010, 0]
    true = made.counterfactual(samples, codes)
    torch.testing.assert_close(made.approximate(samples, codes), true, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(made.approximate(samples, codes, "members"), true, atol=2e-5, rtol=1e-5)
    assert float((true[:, :4] - samples.images[:, None]).abs().amin((2, 3, 4)).max()) > 0.01
    torch.testing.assert_close(true[:, 4], samples.images, atol=1e-6, rtol=0)  # an item that no member saw


def test_jacobian_guesses_small_changes_to_first_order():
    """Members that differ little: the error of the guess falls with the square of the difference."""
    made = ensemble()
    first = [member.state_dict() for member in made.members]
    errors = []
    for share in (0.1, 0.01):
        for member, state in zip(made.members, first, strict=True):
            member.load_state_dict({name: share * state[name] + (1 - share) * first[0][name] for name in state})
        samples = made.sample(2, clip=False)
        true = made.counterfactual(samples, [0b0011, 0b0110]).double()
        guess = made.approximate(samples, [0b0011, 0b0110]).double()
        change = (true - samples.images[:, None]).abs().max()
        errors.append(float((guess - true).abs().max() / change))
    assert errors[0] < 0.1
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("trajectory", ["noise", "trajectory"])
@pytest.mark.parametrize("sampler", [{}, {"method": "ddim", "steps": 3}], ids=str)
def test_last_step_leaves_members_out_at_the_last_step_alone(sampler, trajectory):
    made = ensemble()
    samples = made.sample(3, record=trajectory, **sampler)
    codes = [0b0011, 0b0111]
    found = made.approximate(samples, codes, "last_step", batch_size=2)
    weights = torch.from_numpy(ablation_weights(codes, 4))
    x = made.sample(3, record="trajectory", **sampler).trajectory[:, -2].double()
    abar = SCHEDULE.alphas_cumprod[0]
    for m in range(2):
        e = sum(
            v * member(x, torch.zeros(3, dtype=torch.int64)) for v, member in zip(weights[m], made.members, strict=True)
        )
        # At t = 0 either sampler's last image is x0, clipped.
        expected = ((x - (1 - abar).sqrt() * e) / abar.sqrt()).clamp(-1, 1)
        torch.testing.assert_close(found[:, m], expected.detach().float(), atol=1e-5, rtol=1e-5)


def test_members_adds_their_own_images():
    made = ensemble()
    samples = made.sample(2)
    alone = torch.stack([made.sample(2, weights=row).images for row in torch.eye(4)], 1)
    found = made.approximate(samples, [0b0110], "members")[:, 0]
    # n = 2 h: y + (1/n) sum s_i (y_i - y), plus on members that did not see the item.
    expected = samples.images + sum(s * (alone[:, i] - samples.images) for i, s in enumerate((1, -1, -1, 1))) / 4
    torch.testing.assert_close(found, expected)


def test_tangents_and_batches_may_be_split():
    made = ensemble()
    samples = made.sample(5)
    expected = made.jacobian(samples)
    made._jacobian = None
    torch.testing.assert_close(made.jacobian(samples, batch_size=2, tangents_per_pass=3), expected)


def test_writing_into_a_jacobian_changes_no_later_answer():
    made = ensemble()
    samples = made.sample(2)
    J = made.jacobian(samples)
    kept, scores = J.clone(), made.scores(samples)
    J.zero_()
    assert torch.equal(made.scores(samples), scores)
    made.jacobian(samples).zero_()
    assert torch.equal(made.jacobian(samples), kept)


def test_gram_scores_and_search_agree_with_the_jacobian():
    made = ensemble(members=6, items=8)
    samples = made.sample(3)
    J = made.jacobian(samples).double()
    gram = made.gram(samples)
    assert gram.dtype == torch.float64 and torch.equal(gram, gram.mT)
    torch.testing.assert_close(gram, J.mT @ J)
    directions = torch.from_numpy(ablation_weights(made.codes, 6)) - 1 / 6
    expected = torch.linalg.vector_norm(J @ directions.T, dim=1)  # [Q, N]
    scores = made.scores(samples)
    assert scores.shape == (3, 8) and scores.dtype == torch.float32 and not made.signed
    torch.testing.assert_close(scores.double(), expected, atol=0, rtol=1e-5)
    guess = made.approximate(samples, made.codes)
    change = (guess - samples.images[:, None]).flatten(2).norm(dim=2) / 2  # in [0, 1]
    torch.testing.assert_close(change, scores, atol=1e-5, rtol=1e-4)
    for largest in (True, False):
        values, items = made.search(samples, 3, largest=largest)
        best = expected.sort(dim=1, descending=largest, stable=True)
        torch.testing.assert_close(values, best.values[:, :3], atol=0, rtol=1e-5)
        assert torch.equal(items, best.indices[:, :3])


def test_search_among_other_codes(tmp_path):
    made = ensemble(members=6)
    samples = made.sample(2)
    codes = np.array([0, 1, 2**5, 0b11111, 0b101], np.uint64)
    changes = (torch.from_numpy(ablation_weights(codes, 6)) - 1 / 6) @ made.jacobian(samples).double().mT  # [Q, 5, D]
    expected = changes.norm(dim=2).sort(dim=1, descending=True)
    np.save(tmp_path / "codes.npy", codes)
    for given in (codes, torch.from_numpy(codes), tmp_path / "codes.npy"):
        values, items = made.search(samples, 5, codes=given)
        torch.testing.assert_close(values, expected.values, atol=0, rtol=1e-5)
        assert torch.equal(items, expected.indices)
        assert (items[:, -1] == 0).all() and (values[:, -1] == 0).all()  # an item that no member saw


def test_no_queries():
    made = ensemble()
    samples = made.sample(1)[:0]
    assert made.counterfactual(samples, [1, 2]).shape == (0, 2, 1, 4, 4)
    assert made.jacobian(samples).shape == (0, 16, 4) and made.gram(samples).shape == (0, 4, 4)
    assert made.scores(samples).shape == (0, 6)
    assert made.search(samples, 2).indices.shape == (0, 2)
    for method in ("jacobian", "members", "last_step"):
        assert made.approximate(samples, [1], method).shape == (0, 1, 1, 4, 4)


def test_scores_in_blocks(monkeypatch):
    made = ensemble(members=6, items=10)
    samples = made.sample(2)
    expected = made.scores(samples)
    monkeypatch.setattr("pyattr.attribution.encoded._BLOCK", 3)
    assert torch.equal(made.scores(samples), expected)


def test_uneven_weights_are_the_origin_of_scores_and_not_for_search():
    made = ensemble(members=4)
    weights = [0.4, 0.3, 0.2, 0.1]
    samples = made.sample(2, weights=weights)
    J = made.jacobian(samples).double()
    directions = torch.from_numpy(ablation_weights(made.codes, 4)) - torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(made.scores(samples).double(), (J @ directions.T).norm(dim=1), atol=0, rtol=1e-5)
    with pytest.raises(ValueError, match="queries must be made with uniform weights to be searched for"):
        made.search(samples, 2)


def test_distinct_top_by_hand():
    """Item 0 tops both lists; without it item 3 is in both; then nothing is."""
    scores = torch.tensor([[9.0, 5.0, 4.0, 6.0, 1.0, 3.0], [9.0, 1.0, 2.0, 7.0, 6.0, 5.0]])
    values, items = distinct_top(scores, 2)
    assert items.tolist() == [[1, 2], [4, 5]]
    assert values.tolist() == [[5.0, 4.0], [6.0, 5.0]]
    assert distinct_top(scores[:1], 3).indices.tolist() == [[0, 3, 1]]
    of_numpy = distinct_top(scores.numpy(), 2)
    assert all(isinstance(array, np.ndarray) for array in of_numpy) and of_numpy.indices.tolist() == [[1, 2], [4, 5]]
    with pytest.raises(TypeError, match=r"^distinct_top: scores must be a torch tensor, NumPy array or CuPy array, "):
        distinct_top(scores.tolist(), 2)
    with pytest.raises(ValueError, match="m must be at most the 2 items that are left, got 3"):
        distinct_top(scores, 3)
    with pytest.raises(ValueError, match=r"^distinct_top: m must lie in \[1, 6\], got 0$"):
        distinct_top(scores, 0)
    with pytest.raises(TypeError, match=r"^distinct_top: m must be an integer, got float$"):
        distinct_top(scores, 2.0)
    with pytest.raises(ValueError, match=r"^distinct_top: scores must have shape \[Q, N\], got \[6\]$"):
        distinct_top(scores[0], 2)


def test_distinct_top_of_an_ensemble():
    made = ensemble(members=6, items=10)
    samples = made.sample(2)
    values, items = made.distinct_top(samples, 1)
    assert len(set(items.flatten().tolist())) == 2
    torch.testing.assert_close(values, made.scores(samples).gather(1, items))


def test_interrupted_jacobians_go_on(tmp_path, monkeypatch):
    made = ensemble()
    samples = made.sample(3)
    expected, told = made.jacobian(samples, batch_size=2), []
    monkeypatch.setattr("pyattr.attribution.encoded_jacobian.SAVE_SECONDS", 0)

    class Stop(Exception):
        pass

    def stop(done, total, stage):
        if done == 12 + 4:  # in the second batch
            raise Stop

    first, state = tmp_path / "jacobian-00000000.safetensors", tmp_path / "jacobian-unfinished-00000002.safetensors"
    with pytest.raises(Stop):
        made.jacobian(samples, batch_size=2, directory=tmp_path, progress=stop)
    assert sorted(tmp_path.iterdir()) == [first, state]
    (tmp_path / "damaged").mkdir()
    for path in (first, state):
        (tmp_path / "damaged" / path.name).write_bytes(path.read_bytes()[: None if path is first else -1])
    written = first.stat().st_mtime_ns
    again = made.jacobian(samples, batch_size=2, directory=tmp_path, progress=lambda *now: told.append(now))
    assert torch.equal(again, expected)
    assert first.stat().st_mtime_ns == written and not state.exists()
    assert told[0][0] > 12 and told[-1] == (18, 18, "jacobian")
    assert torch.equal(made.jacobian(samples, batch_size=2, directory=tmp_path / "damaged"), expected)
    with pytest.raises(
        ValueError, match="holds results made otherwise: batch_size was 2, now 1; use another directory"
    ):
        made.jacobian(samples, batch_size=1, directory=tmp_path)


def test_states_of_other_samples_are_refused(tmp_path, monkeypatch):
    made = ensemble()
    monkeypatch.setattr("pyattr.attribution.encoded_jacobian.SAVE_SECONDS", 0)

    def stop(done, total, stage):
        if done == 3:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        made.jacobian(made.sample(1), directory=tmp_path, progress=stop)
    with pytest.raises(ValueError, match=r"holds results made otherwise: .*seed was 0, now 1"):
        made.jacobian(made.sample(1, seed=1), directory=tmp_path)


def test_errors():
    made = ensemble()
    samples = made.sample(1)
    with pytest.raises(ValueError, match="method must be one of jacobian, last_step, members, got 'magic'"):
        made.approximate(samples, [1], "magic")
    with pytest.raises(TypeError, match="tangents_per_pass goes with the method jacobian alone"):
        made.approximate(samples, [1], "members", tangents_per_pass=2)
    with pytest.raises(ValueError, match=r"^EncodedEnsemble: tangents_per_pass must lie in \[1, 2147483648\], got 0$"):
        made.jacobian(samples, tangents_per_pass=0)
    with pytest.raises(TypeError, match=r"^EncodedEnsemble: tangents_per_pass must be an integer, got float$"):
        made.jacobian(samples, tangents_per_pass=2.0)
    with pytest.raises(ValueError, match=r"^EncodedEnsemble: k must lie in \[0, 6\], got -1$"):
        made.search(samples, -1)
    with pytest.raises(ValueError, match=r"^EncodedEnsemble: k must lie in \[0, 2\], got 3$"):
        made.search(samples[:0], 3, codes=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"^EncodedEnsemble: k must be an integer, got float"):
        made.search(samples, 2.0)
    with pytest.raises(TypeError, match=r"queries must be Samples of this ensemble.* got Tensor"):
        made.scores(samples.images)
    with pytest.raises(ValueError, match="queries must be samples of this ensemble: model was"):
        ensemble(seed=1).scores(samples)
    assert made.approximate(samples, np.array([], np.uint64)).shape == (1, 0, 1, 4, 4)


def test_jacobian_of_unmodified_unets():
    """Attention and group normalisation, along one direction of the image: v -> <u, y(v)> by backpropagation."""
    made = EncodedEnsemble(
        lambda: unet("mnist-small", size=8, schedule=SCHEDULE).double(),
        [1, 2],
        num_members=2,
        schedule=SCHEDULE,
        steps=1,
    ).fit(nn.functional.pad(IMAGES[:2], (2, 2, 2, 2)))
    samples = made.sample(2, clip=False)
    u = torch.randn(2, 64, dtype=torch.float64)
    weights = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
    y = by_hand(made.members, weights, samples, "published", 6, clip=False)
    (expected,) = torch.autograd.grad((u * y.flatten(1)).sum(), weights)
    torch.testing.assert_close(
        torch.einsum("qd,qdi->i", u, made.jacobian(samples).double()), expected, atol=0, rtol=1e-5
    )
