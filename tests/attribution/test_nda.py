"""NDA: its scores against the definition written out, its maps, its options, and what it keeps on disk."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from pyattr import testing
from pyattr.attribution import NDA, nda
from pyattr.attribution.patch_matches import find_matches
from pyattr.diffusion import DamagedFileError, Samples, Schedule
from pyattr.diffusion.noise import PATCHES, noise
from pyattr.diffusion.storage import load_tensors, save_tensors

SMALL = {"timesteps": [20, 300], "patch_sizes": [3, 5], "coarse_patch_sizes": 4, "k": 3}


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 2, 6, 5), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.fixture
def queries():
    return torch.randint(0, 256, (3, 2, 6, 5), generator=torch.Generator().manual_seed(2)).to(torch.uint8)


def window(image, row, column, size):
    """The window of an image [C][H][W] whose first pixel is (row, column), and which of its pixels lie within; loops alone."""
    channels, height, width = len(image), len(image[0]), len(image[0][0])
    cells, inside = [], []
    for i in range(row, row + size):
        for j in range(column, column + size):
            within = 0 <= i < height and 0 <= j < width
            inside.append(within)
            cells.append([image[c][i][j] if within else 0.0 for c in range(channels)])
    return cells, inside


def by_definition(query, images, *, schedule, timestep, size, coarse, k, border, seed=0, draw=0):
    """One term's scores of one query, [N], and the log-normalisers by position, in nested loops of Python floats."""
    abar = float(schedule.alphas_cumprod[timestep])
    eps = noise(query.shape, seed=seed, ids=0, timesteps=timestep, draws=draw, purpose=PATCHES).double()
    unit = (2 * query.double() - 255) / 255
    noisy = (math.sqrt(abar) * unit + math.sqrt(1 - abar) * eps).tolist()
    bank = [(math.sqrt(abar) * (2 * image.double() - 255) / 255).tolist() for image in images]
    height, width = query.shape[1:]
    pad = (size - 1) // 2
    places = [(r - pad, c - pad) for r in range(height + 2 * pad - size + 1) for c in range(width + 2 * pad - size + 1)]

    def values(cells):
        if not coarse:
            return [value for cell in cells for value in cell]
        half = size // 2
        return [
            sum(cells[(2 * i + a) * size + 2 * j + b][c] for a in (0, 1) for b in (0, 1)) / 2
            for i in range(half) for j in range(half) for c in range(len(cells[0]))
        ]  # fmt: skip

    theirs = [[(values(cells), inside) for cells, inside in (window(y, r, c, size) for r, c in places)] for y in bank]
    scores, normalisers = [0.0] * len(images), []
    for r, c in places:
        cells, inside = window(noisy, r, c, size)
        ours = values(cells)
        weights = [
            [
                math.exp(-sum((a - b) ** 2 for a, b in zip(ours, patch, strict=True)) / (2 * (1 - abar)))
                if border == "zero" or cut == inside else 0.0
                for patch, cut in patches
            ]
            for patches in theirs
        ]  # fmt: skip
        total = sum(map(sum, weights))
        normalisers.append(math.log(total))
        for n, of_image in enumerate(weights):
            scores[n] += sum(sorted(of_image)[-k:]) / total
    return scores, normalisers


# Scores


@pytest.mark.parametrize("border", ["class", "zero"])
def test_scores_are_those_of_the_definition(images, queries, border):
    schedule = Schedule(500, 1e-3, 0.02)
    method = NDA(schedule, timesteps=[20, 300], patch_sizes=[3, 4], coarse_patch_sizes=4, alpha=[0.25, 1.0], k=2,
                 num_noises=2, noise_seed=7, border=border).fit(images)  # fmt: skip
    got = method.scores(queries)
    assert got.dtype == torch.float32 and got.shape == (3, 6)
    for q, query in enumerate(queries):
        expected = np.zeros(6)
        for timestep, size, coarse, weight in ((20, 3, False, 0.25), (20, 4, True, 0.75), (300, 4, False, 1.0)):
            for draw in (0, 1):
                scores, _ = by_definition(query, images, schedule=schedule, timestep=timestep, size=size, coarse=coarse,
                                          k=2, border=border, seed=7, draw=draw)  # fmt: skip
                expected += weight * np.array(scores) / 4
        np.testing.assert_allclose(got[q], expected, rtol=1e-4, atol=1e-6)


def test_all_weights_of_a_query_add_up_to_its_patches(images, queries):
    # Odd patches: 6 x 5 positions; even ones: 5 x 4.
    scores = NDA(**{**SMALL, "k": 1000, "alpha": 0.25}).fit(images).scores(queries)
    np.testing.assert_allclose(scores.sum(1), [0.25 * 30 + 0.75 * 20] * 3, rtol=1e-5)
    assert bool((scores >= 0).all())


def test_a_training_image_is_its_own_proponent(images):
    scores = NDA(timesteps=[5], patch_sizes=3, coarse_patch_sizes=4).fit(images).scores(images)
    assert scores.argmax(1).tolist() == list(range(6))


def test_a_score_depends_on_its_query_alone(images, queries, monkeypatch):
    """Neither on the other queries nor on the batches: all meet the same noise."""
    whole = NDA(**SMALL).fit(images).scores(queries)
    monkeypatch.setattr(nda, "_BATCH", 2)
    alone = NDA(**SMALL).fit(images).scores(queries.flip(0))
    torch.testing.assert_close(alone.flip(0), whole, rtol=0, atol=0)
    assert not torch.equal(NDA(**SMALL, noise_seed=1).fit(images).scores(queries), whole)


def test_twins_share_equally(images, queries):
    doubled = NDA(**SMALL).fit(torch.cat([images, images])).scores(queries)
    once = NDA(**SMALL).fit(images).scores(queries)
    torch.testing.assert_close(doubled[:, :6], doubled[:, 6:], rtol=0, atol=0)
    torch.testing.assert_close(doubled[:, :6], once / 2, rtol=1e-5, atol=1e-6)


def test_what_the_images_may_come_as(images, queries, tmp_path):
    expected = NDA(**SMALL).fit(images).scores(queries)
    unit = images.double().div(127.5).sub(1).float()
    samples = Samples(queries.double().div(127.5).sub(1).float(), torch.arange(3), None, None, None, {})
    for train in (images.numpy(), unit, [images[:1], images[1:4].numpy(), images[4:]]):
        torch.testing.assert_close(NDA(**SMALL).fit(train).scores(samples), expected, rtol=1e-4, atol=1e-6)
    colour = torch.randint(0, 256, (4, 3, 6, 6)).to(torch.uint8)
    for number, picture in enumerate(colour):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    torch.testing.assert_close(
        NDA(**SMALL).fit(tmp_path).scores(colour), NDA(**SMALL).fit(colour).scores(colour), rtol=0, atol=0
    )


@pytest.mark.parametrize("backend", testing.usable_backends("patch_topk"))
def test_images_in_float64_go_to_any_backend(images, queries, backend):
    unit = images.double().div(127.5).sub(1).to(testing.device_of(backend))
    expected = NDA(**SMALL).fit(images).scores(queries)
    for train in (unit, list(unit.split(4))):
        found = NDA(**SMALL, backend=backend).fit(train).scores(queries.double().div(127.5).sub(1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_images_that_carry_a_gradient(images, queries):
    train, asked = (given.double().div(127.5).sub(1).float() for given in (images, queries))
    expected = NDA(**SMALL).fit(train).scores(asked)
    found = NDA(**SMALL).fit(train.requires_grad_()).scores(asked.requires_grad_())
    assert torch.equal(found, expected) and not found.requires_grad


def test_one_option_in_an_array(images, queries):
    """Of no dimension: one for all timesteps."""
    given = NDA(**{**SMALL, "patch_sizes": np.array(3), "alpha": torch.tensor(0.25)}).fit(images)
    assert given.terms == NDA(**{**SMALL, "patch_sizes": 3, "alpha": 0.25}).fit(images).terms


def test_no_queries(images, queries):
    assert NDA(**SMALL).fit(images).scores(queries[:0]).shape == (0, 6)


def test_defaults_of_the_published_size():
    method = NDA().fit(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    sizes = {(term.timestep, term.coarse): term.patch_size for term in method.terms}
    assert sizes == {(100, False): 7, (200, False): 11, (300, False): 15, (400, False): 17, (500, False): 19,
                     (100, True): 14, (200, True): 14, (300, True): 14, (400, True): 16, (500, True): 18}  # fmt: skip
    assert [term.weight for term in method.terms] == [0.1] * 10
    assert (method.k, method.num_noises, method.border, method.signed) == (100, 1, "class", False)


def test_defaults_scale_with_the_image_and_the_schedule():
    def sizes(side, **options):
        terms = NDA(**options).fit(torch.zeros(1, 1, side, side, dtype=torch.uint8)).terms
        return [term.patch_size for term in terms if not term.coarse], [t.patch_size for t in terms if t.coarse]

    assert sizes(64) == ([15, 23, 31, 35, 39], [28, 28, 28, 32, 36])  # 14, 22, 30, ... to the nearest odd number above
    assert sizes(28) == ([7, 9, 13, 15, 17], [12, 12, 12, 14, 16])
    assert sizes(6) == ([3, 3, 3, 3, 3], [4, 4, 4, 4, 4])
    # Half way between two of the defaults, and beyond them.
    assert sizes(32, timesteps=[150, 0, 999]) == ([9, 7, 19], [14, 14, 18])
    assert NDA(Schedule(20)).timesteps == [2, 4, 6, 8, 10]
    # Patches end where those of the kernels do: 19 and 18 pixels in 32 would be 607 and 576 in 1024.
    assert (sizes(1024)[0][-1], sizes(1024)[1][-1]) == (511, 510)


# Explanations


@pytest.mark.parametrize("k", [1, 2, 1000])
@pytest.mark.parametrize("border", ["class", "zero"])
def test_the_maps_add_up_to_the_score(images, queries, k, border):
    method = NDA(**{**SMALL, "k": k}, border=border, num_noises=2).fit(images)
    scores = method.scores(queries)
    for q, n in ((0, 0), (1, 5), (2, 3)):
        found = method.explain(queries[q], n)
        assert found.query_map.shape == found.image_map.shape == (6, 5)
        np.testing.assert_allclose(found.score, scores[q, n], rtol=1e-4)
        for each in (found.query_map, found.image_map):
            np.testing.assert_allclose(float(each.double().sum()), found.score, rtol=1e-5)
        assert sum(match.weight for match in found.matches) <= found.score * (1 + 1e-5)


def test_the_query_map_is_what_each_position_contributes(images, queries):
    """All images together fill every position of a query: 1 at each pixel, where even patches count a quarter each."""
    method = NDA(timesteps=[100], patch_sizes=3, alpha=1, k=1000).fit(images)
    total = sum(method.explain(queries[0], n).query_map for n in range(6))
    np.testing.assert_allclose(total, np.ones((6, 5)), rtol=1e-4)
    method = NDA(timesteps=[100], coarse_patch_sizes=4, alpha=0, k=1000).fit(images)
    total = sum(method.explain(queries[0], n).query_map for n in range(6))
    row, column = np.array([1, 2, 2, 2, 2, 1]), np.array([1, 2, 2, 2, 1])
    np.testing.assert_allclose(total, np.outer(row, column) / 4, rtol=1e-4)


def test_a_copied_region_is_found_where_it_was_copied_from():
    rng = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (8, 1, 16, 16), generator=rng).to(torch.uint8)
    query = torch.randint(0, 256, (1, 16, 16), generator=rng).to(torch.uint8)
    query[:, 9:15, 2:8] = images[5, :, 3:9, 8:14]
    method = NDA(timesteps=[2], patch_sizes=3, alpha=1).fit(images)
    found = method.explain(query, 5, pairs=1, side=3)
    (match,) = found.matches
    assert (match.image[0] - match.query[0], match.image[1] - match.query[1]) == (3 - 9, 8 - 2)
    assert 9 <= match.query[0] <= 12 and 2 <= match.query[1] <= 5 and match.size == (3, 3)
    # Where the 3 x 3 patches lie within the copy, they take the whole weight.
    np.testing.assert_allclose(found.query_map[10:14, 3:7], 1, atol=1e-3)
    assert bool((found.image_map[4:8, 9:13] > 0.999).all())
    assert match.weight > 8.9


def test_matches_by_hand():
    flow = torch.zeros(4, 5, 4, 5)
    flow[1, 1, 2, 3] = 2.0  # (1, 2) further
    flow[2, 2, 3, 4] = 1.0  # the same displacement, beside it
    flow[1, 1, 0, 0] = 2.5  # heavier alone, lighter than the two together
    flow[0, 4, 3, 0] = 0.5  # far from them
    first, second = find_matches(flow, 5, 3)
    # Two centres see both; the first in reading order is (1, 1), whose square stays within either image.
    assert (first.query, first.image, first.size, first.weight) == ((0, 0), (1, 2), (3, 3), 3.0)
    assert (second.query, second.image, second.size, second.weight) == ((0, 4), (3, 0), (1, 1), 0.5)
    assert find_matches(flow, 0, 3) == [] and find_matches(torch.zeros(2, 2, 2, 2), 3, 3) == []


def test_matches_against_a_search():
    """The heaviest pair of squares, by looking at all of them."""
    flow = torch.rand(5, 4, 5, 4) ** 8
    for side in (1, 2, 3):
        best = (0.0, None, None)
        for r, c, r2, c2 in np.ndindex(5, 4, 5, 4):
            weight = sum(
                float(flow[r + i, c + j, r2 + i, c2 + j])
                for i in range(-(side // 2), side - side // 2)
                for j in range(-(side // 2), side - side // 2)
                if min(r + i, r2 + i, c + j, c2 + j) >= 0 and max(r + i, r2 + i) < 5 and max(c + j, c2 + j) < 4
            )
            best = max(best, (weight, (r, c), (r2, c2)))
        (match,) = find_matches(flow, 1, side)
        assert match.weight == pytest.approx(best[0], rel=1e-5)
        assert np.subtract(match.image, match.query).tolist() == np.subtract(best[2], best[1]).tolist()


def test_an_explanation_is_the_same_whether_scored_before_or_not(images, queries, monkeypatch):
    method = NDA(**SMALL).fit(list(images.split(2)))
    method.scores(queries)
    monkeypatch.setattr(NDA, "compute", None)  # no pass over the training images
    before = method.explain(queries[1], 4)
    monkeypatch.undo()
    fresh = NDA(**SMALL).fit(images).explain(queries[1:2], 4)
    assert before.matches == fresh.matches
    torch.testing.assert_close(before.query_map, fresh.query_map, rtol=1e-5, atol=1e-7)


# On disk


def test_tables_are_found_again(images, queries, tmp_path, monkeypatch):
    told = []
    expected = NDA(**SMALL, directory=tmp_path, progress=lambda *of: told.append(of)).fit(images).scores(queries)
    assert told[0] == (0, 12, "patches") and told[-1] == (12, 12, "patches")
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    again = NDA(**SMALL, directory=tmp_path).fit(list(images.split(4)))
    kept = NDA.compute
    monkeypatch.setattr(NDA, "compute", None)
    torch.testing.assert_close(again.scores(queries), expected, rtol=0, atol=0)
    # One that is missing is computed again, the others are not; a damaged one is refused.
    first, *rest = sorted(tmp_path.rglob("*.safetensors"))
    assert len(rest) == 3
    first.unlink()
    monkeypatch.setattr(NDA, "compute", lambda *a: kept(*a) if not first.exists() else None)
    torch.testing.assert_close(again.scores(queries), expected, rtol=0, atol=0)
    rest[0].write_bytes(rest[0].read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamagedFileError, match=rf"{re.escape(str(rest[0]))} is damaged"):
        again.scores(queries)


def test_tables_of_something_else_are_refused(images, queries, tmp_path):
    NDA(**SMALL, directory=tmp_path).fit(images).scores(queries)
    with pytest.raises(ValueError, match=r"was made otherwise: noise_seed was 0, now 1; use another directory"):
        NDA(**SMALL, noise_seed=1, directory=tmp_path).fit(images).scores(queries)
    with pytest.raises(ValueError, match="was made otherwise: data was"):
        NDA(**SMALL, directory=tmp_path).fit(images.flip(0)).scores(queries)


def test_tables_of_another_version_are_refused(images, queries, tmp_path):
    NDA(**SMALL, directory=tmp_path).fit(images).scores(queries)
    path = min(tmp_path.rglob("*.safetensors"))
    tensors, record = load_tensors(path)
    assert record.pop("format") == 1
    for made, version in ((record, "None"), ({**record, "format": 2}, "2")):
        save_tensors(path, tensors, made)
        message = f"NDA: {path} has format {version}, of another version of pyattr, and this one reads 1; "
        with pytest.raises(ValueError, match=re.escape(message + "use another directory or delete it")):
            NDA(**SMALL, directory=tmp_path).fit(images).scores(queries)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": []}, "NDA: timesteps must be distinct and lie in [0, 1000), got []"),
        ({"timesteps": [5, 5]}, "NDA: timesteps must be distinct and lie in [0, 1000), got [5, 5]"),
        ({"timesteps": [1000]}, "NDA: timesteps must be distinct and lie in [0, 1000), got [1000]"),
        ({"patch_sizes": [3, 5]}, "NDA: patch_sizes must be one number or one for each of 5 timesteps, got 2"),
        ({"patch_sizes": 0}, "NDA: patch_sizes must be positive, got 0"),
        ({"patch_sizes": 513}, "NDA: patch_sizes must be at most 511, got 513"),
        ({"coarse_patch_sizes": 7}, "NDA: coarse_patch_sizes must be positive and even, got 7"),
        ({"coarse_patch_sizes": 512}, "NDA: coarse_patch_sizes must be at most 511, got 512"),
        ({"alpha": 1.5}, "NDA: alpha must lie in [0, 1], got 1.5"),
        ({"alpha": math.nan}, "NDA: alpha must lie in [0, 1], got nan"),
        ({"k": 0}, "NDA: k must be at least 1, got 0"),
        ({"num_noises": 5000}, "NDA: num_noises must be at least 1 and at most 4096, got 5000"),
        ({"noise_seed": -1}, "NDA: noise_seed must lie in [0, 4294967295], got -1"),
        ({"border": "inside"}, "NDA: border must be class or zero, got 'inside'"),
        ({"backend": "foo"}, "NDA: backend must be one of cuda, triton, cpu, reference, got 'foo'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NDA(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: 2.5}, f"NDA: {name} must be an integer, got 2.5")
          for name in ("patch_sizes", "coarse_patch_sizes", "k", "num_noises", "noise_seed")),
        ({"timesteps": [1, 2.5]}, "NDA: each of timesteps must be an integer, got 2.5"),
        ({"timesteps": 100}, "NDA: timesteps must be a sequence, got 100"),
        ({"timesteps": [9], "patch_sizes": ["3"]}, "NDA: each of patch_sizes must be an integer, got '3'"),
        ({"alpha": "half"}, "NDA: alpha must be a number, got 'half'"),
        ({"timesteps": [9], "alpha": [None]}, "NDA: each of alpha must be a number, got None"),
        ({"schedule": 1000}, "NDA: schedule must be a Schedule, got int"),
    ],
)  # fmt: skip
def test_options_of_another_kind(options, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        NDA(**options)


@pytest.mark.parametrize("left", [0, 1, 5])
def test_chunks_that_change_after_fit_are_refused(images, queries, left):
    chunks = [images]
    method = NDA(**SMALL).fit(chunks)
    chunks[0] = images[:left]
    with pytest.raises(RuntimeError, match=rf"^NDA: train changed after fit: 6 images, then {left}$"):
        method.scores(queries)


def test_images_that_cannot_be(images, queries):
    method = NDA(**SMALL)
    with pytest.raises(RuntimeError, match=r"^NDA: fit must be called before scores, explain and tune$"):
        method.scores(queries)
    with pytest.raises(ValueError, match=r"^NDA: train must hold at least one image, got none$"):
        method.fit(images[:0])
    with pytest.raises(ValueError, match=r"^NDA: train must hold at least one image, got none$"):
        method.fit([])
    with pytest.raises(TypeError, match=r"^NDA: train must be an array, a path or chunks that can be walked through more "
                                        r"than once, got generator$"):  # fmt: skip
        method.fit(chunk for chunk in [images])
    with pytest.raises(ValueError, match=r"^NDA: train must be images of one shape, got \[2, 6, 5\] and \[2, 5, 5\]$"):
        method.fit([images, images[:, :, 1:]])
    method.fit(images)
    with pytest.raises(ValueError, match=r"^NDA: queries must have shape \[Q, 2, 6, 5\] as the training images, "
                                         r"got \[3, 1, 6, 5\]$"):  # fmt: skip
        method.scores(queries[:, :1])
    with pytest.raises(ValueError, match=r"^NDA: query must be one image \[C, H, W\], got 3$"):
        method.explain(queries, 0)
    with pytest.raises(IndexError, match=r"^NDA: image must lie in \[0, 6\), got 6$"):
        method.explain(queries[0], 6)


def test_explanations_that_cannot_be(images, queries, monkeypatch):
    method = NDA(**SMALL).fit(images)
    monkeypatch.setattr(NDA, "compute", None)  # refused before the work
    with pytest.raises(ValueError, match=r"^NDA: pairs must not be negative, got -1$"):
        method.explain(queries[0], 0, pairs=-1)
    for side in (0, 7, 10**6):
        with pytest.raises(ValueError, match=rf"^NDA: side must lie in \[1, 6\], got {side}$"):
            method.explain(queries[0], 0, side=side)
    for options in ({"image": 3.0}, {"image": 0, "side": 3.0}, {"image": 0, "pairs": 3.0}):
        name = list(options)[-1]
        with pytest.raises(TypeError, match=rf"^NDA: {name} must be an integer, got 3\.0$"):
            method.explain(queries[0], **options)


def test_regions_as_large_as_the_image(images, queries):
    (match,) = NDA(**SMALL).fit(images).explain(queries[0], torch.tensor(3), side=6).matches
    assert max(match.size) <= 6 and min(match.size) >= 1


def test_images_without_room_for_a_patch():
    """Every window of even side covers two pixels and more."""
    pixel, row = torch.zeros(3, 1, 1, 1, dtype=torch.uint8), torch.zeros(3, 1, 1, 9, dtype=torch.uint8)
    coarse = "the coarse scale, which alpha=1 leaves out"
    for options, what in (
        ({}, coarse),
        ({"alpha": 0.0}, coarse),
        ({"alpha": 1, "patch_sizes": 6}, "patches of 6 pixels"),
    ):
        for images, size in ((pixel, "1 x 1"), (row, "1 x 9")):
            message = re.escape(f"NDA: train must be images of at least 2 x 2 pixels for {what}, got {size}")
            with pytest.raises(ValueError, match=f"^{message}$"):
                NDA(**options).fit(images)
    scores = NDA(alpha=1).fit(pixel).scores(pixel[:1])
    np.testing.assert_allclose(scores, [[1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"^NDA: train must be images of at least one pixel, got shape \[3, 1, 0, 9\]$"
    ):
        NDA().fit(row[:, :, :0])
