"""Every method and option of `pyattr attribute` gives what the library gives with the same settings, to the bit."""

import json
import re

import numpy as np
import pytest
import torch
from toy_runs import SCHEDULE, SCORE, SETTINGS

from pyattr import attribution, diffusion, evaluation
from pyattr.attribution import Readout
from pyattr.cli.options import FEATURES, METHODS, READOUTS, SIMILARITIES
from pyattr.diffusion.losses import NAMES, Loss
from pyattr.diffusion.storage import data_hash
from pyattr.evaluation.ground_truth import image_hashes


@pytest.fixture
def attributed(copied, succeeds, arrays):
    """Run `pyattr attribute` in that folder; the folder, what it says, and what scores.npz holds."""

    def run(*arguments, settings=SCORE):
        told = succeeds("attribute", "--out", copied, "--top", 4, *arguments, *settings)
        return copied, told, arrays(copied / "scores.npz")

    return run


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Those of SCORE for the library, whose features of the loss lie in a directory of its own."""
    return SETTINGS | {"directory": tmp_path_factory.mktemp("features")}


def samples_of(out):
    return diffusion.Samples.load(next(out.glob("generate-*")) / "samples-00000000.safetensors")


def model_of(out):
    return diffusion.load_model(next(out.glob("train-*")))


def test_names_are_those_of_the_library():
    assert set(FEATURES) == set(NAMES)
    assert {name.replace("-", "_") for name in READOUTS} == set(attribution.READOUTS)
    assert set(SIMILARITIES) == set(attribution.similarity.SIMILARITIES)


# Checkpoints and trajectories


def test_methods_that_follow_the_training_and_the_sampling(attributed, train, settings):
    methods = ["tracincp", "gas", "journey-trak", "gradient-dot"]
    out, told, found = attributed(*(x for name in methods for x in ("-m", name)))
    files = list(diffusion.checkpoints(next(out.glob("train-*"))).values())
    assert len(files) == 3
    model, samples = model_of(out), samples_of(out)
    images, ids = samples.uint8(), attribution.QUERY_IDS + samples.ids
    for number, kind in (("", attribution.TracInCP), ("_2", attribution.GAS)):
        method = kind(model, SCHEDULE, checkpoints=files, **settings).fit(train)
        np.testing.assert_array_equal(found[f"scores{number}"], method.scores(images, ids=ids))
    journey = attribution.JourneyTRAK(model, SCHEDULE, **settings).fit(train)
    np.testing.assert_array_equal(found["scores_3"], journey.scores(samples))
    dots = attribution.GradientDot(model, SCHEDULE, **settings).fit(train).scores(images, ids=ids)
    np.testing.assert_array_equal(found["scores_4"], dots)
    assert not np.array_equal(found["scores"], found["scores_4"])
    # Features of three networks, the last of which all four methods share.
    assert len(list(out.glob("trak-features-*"))) == 3 and "1/7" in told
    assert found["methods"].tolist() == [METHODS[name] for name in methods]
    page = (out / "report.html").read_text()
    for words in ("3, after steps 1, 2, 3", "those of the sampler that made it", "counts them alike"):
        assert words in page, words


def test_checkpoints_evenly_spaced_and_up_to_a_given_one(attributed, train, settings):
    out, _, found = attributed("-m", "tracincp", "--checkpoints", 2)
    files = diffusion.checkpoints(next(out.glob("train-*")))
    samples = samples_of(out)
    queries, ids = samples.uint8(), attribution.QUERY_IDS + samples.ids
    method = attribution.TracInCP(model_of(out), SCHEDULE, checkpoints=[files[1], files[3]], **settings).fit(train)
    np.testing.assert_array_equal(found["scores"], method.scores(queries, ids=ids))
    # Those up to the second; the features of the first are there.
    np.savez(out / "queries.npz", images=queries[:, 0].numpy())
    given = ("-m", "gas", "--checkpoint", files[2], "--queries", out / "queries.npz")
    _, told, found = attributed(*given)
    assert re.search("TRAK features at step 1 .* found", told)
    method = attribution.GAS(model_of(out), SCHEDULE, checkpoints=[files[1], files[2]], **settings)
    np.testing.assert_array_equal(found["scores"], method.fit(train).scores(queries))
    # Any method takes any checkpoint, and finds its features too.
    _, told, found = attributed("-m", "gradient-cosine", *given[2:])
    assert re.search("TRAK features .* found", told)
    method = attribution.GAS(model_of(out), SCHEDULE, checkpoints=[files[2]], **settings).fit(train)
    np.testing.assert_array_equal(found["scores"], method.scores(queries))


def test_what_is_kept_besides_changes_no_model_and_no_image(followed, finished):
    kept, other = (diffusion.checkpoints(next(out.glob("train-*"))) for out in (followed, finished))
    assert [*kept] == [1, 2, 3] and [*other] == [2, 3]
    first, second = (diffusion.load_model(files[3]).state_dict() for files in (kept, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    samples, others = samples_of(followed), samples_of(finished)
    assert samples.trajectory.shape == (2, 3, 1, 8, 8) and others.trajectory is None
    np.testing.assert_allclose(samples.images, others.images[:2], atol=1e-6)  # of batches of two and of three


# Functions, noises and lambda


def test_features_noises_and_a_grid_of_lambdas(attributed, train):
    grid = (1e-8, 1e-3, 1e3)
    given = ("--num-noises", 2, "--query-noises", 3, "--lambda", ",".join(map(str, grid)), "-m", "trak")
    out, _, found = attributed(*given, "--feature", "interpolate", "--eta", 0.25)
    samples = samples_of(out)
    options = SETTINGS | {"num_noises": 2, "query_noises": 3, "lambda_": grid, "feature": Loss("interpolate", 0.25)}
    method = attribution.TRAK(model_of(out), SCHEDULE, **options).fit(train)
    np.testing.assert_array_equal(
        found["scores"], method.scores(samples.uint8(), ids=attribution.QUERY_IDS + samples.ids)
    )
    told = json.loads(str(found["settings"]))["methods"][0]
    assert told["lambda"] == method.lambda_ in grid and told["lambda_"] == list(grid)
    assert told["feature"] == "interpolate" and told["eta"] == 0.25
    assert found["methods"].tolist() == ["TRAK of interpolate 0.25"]
    page = (out / "report.html").read_text()
    for words in ("a mixture (0.25 : 0.75)", "2 noise draws at each of a training image, 3 noise draws at each of a query",
                  "chosen automatically among 1e-08, 0.001, 1000", "as nearly as the 3 values given allow"):  # fmt: skip
        assert words in page, words


@pytest.mark.parametrize("name", ["elbo", "l2"])
def test_another_function_of_normalised_gradients(attributed, train, name):
    out, _, found = attributed("-m", "gradient-dot", "--feature", name, "--normalize", "--no-report")
    samples = samples_of(out)
    method = attribution.GradientDot(model_of(out), SCHEDULE, feature=name, normalize=True, **SETTINGS).fit(train)
    ids = attribution.QUERY_IDS + samples.ids
    np.testing.assert_array_equal(found["scores"], method.scores(samples.uint8(), ids=ids))
    assert found["methods"].tolist() == [f"Gradient dot of {name}, normalised"]
    assert list(out.glob(f"{name}-features-*"))


def test_das(attributed, train):
    out, _, found = attributed("-m", "das", "--residuals", "--leverage", "--lambda", 0.1)
    samples = samples_of(out)
    options = {**SETTINGS, "residuals": True, "leverage": True, "lambda_": 0.1}
    method = attribution.DAS(model_of(out), SCHEDULE, **options).fit(train)
    ids = attribution.QUERY_IDS + samples.ids
    np.testing.assert_array_equal(found["scores"], method.scores(samples.uint8(), ids=ids))
    assert found["scores"].min() >= 0 and found["opponents"].shape == (2, 0)
    page = (out / "report.html").read_text()
    for words in ("DAS knows no opponents", "for better or worse", "weighed by the model’s error on it", "residuals, leverage",
                  "each divided by its norm"):  # fmt: skip
        assert words in page, words


def test_das_is_squared_once(attributed, train):
    """Its own score is a square; by --readout the number before it, or another readout of that."""
    given = ("-m", "das", "--lambda", 0.1)
    out, _, own = attributed(*given)
    samples = samples_of(out)
    queries, ids = samples.uint8(), attribution.QUERY_IDS + samples.ids
    options = {**SETTINGS, "lambda_": 0.1}
    signed, squared = (
        attribution.DAS(model_of(out), SCHEDULE, squared=value, **options).fit(train).scores(queries, ids=ids)
        for value in (False, True)
    )
    np.testing.assert_array_equal(own["scores"], squared)
    for name, expected, has_sign in (
        ("squared", squared, False),
        ("signed", signed, True),
        ("signed_squared", Readout("signed_squared")(signed), True),
    ):
        _, told, found = attributed(*given, "--readout", name)
        assert "to do" not in told
        np.testing.assert_array_equal(found["scores"], expected)
        assert found["signed"].tolist() == [has_sign] and found["opponents"].shape == (2, 4 if has_sign else 0)
        assert json.loads(str(found["settings"]))["methods"][0]["readout"]["name"] == name
        page = (out / "report.html").read_text()
        assert ("The score is the square of that" in page) == (name == "squared")
        assert ("positive where its gradient points the same way" in page) == has_sign
    assert found["methods"].tolist() == ["DAS, signed square"] and own["methods"].tolist() == ["DAS"]
    # With others each has its own.
    _, _, found = attributed(*given, "-m", "gradient-dot")
    np.testing.assert_array_equal(found["scores"], squared)
    assert found["signed"].tolist() == [False, True]


def test_one_function_has_one_set_of_features(attributed):
    """TRAK of D-TRAK's function is D-TRAK, and computes nothing twice."""
    out, _, dtrak = attributed("-m", "dtrak", "--no-report")
    _, told, trak = attributed("-m", "trak", "--feature", "square")
    assert re.search("D-TRAK features .* found", told) and len(list(out.glob("dtrak-features-*"))) == 1
    np.testing.assert_array_equal(trak["scores"], dtrak["scores"])


# Readouts


def test_readouts(attributed):
    out, _, found = attributed("-m", "gradient-dot")
    scores = found["scores"]
    assert scores.min() < 0 < scores.max()
    folders = set(out.iterdir())
    for option, kind, name, words in (
        (["squared"], Readout("squared"), "squared", "cannot be told apart any more"),
        (["signed-squared"], Readout("signed_squared"), "signed square", "its square with its own sign"),
        (["head", "--percent", 10], Readout("head", 10), "head of 10%", "itself if among the 10% of largest size"),
    ):
        _, told, found = attributed("-m", "gradient-dot", "--readout", *option)
        assert "to do" not in told and set(out.iterdir()) == folders  # nothing is computed again
        np.testing.assert_array_equal(found["scores"], kind(scores))
        assert found["methods"].tolist() == [f"Gradient dot, {name}"]
        told = json.loads(str(found["settings"]))["methods"][0]["readout"]
        assert told == {"name": kind.name, "percent": kind.percent}
        page = (out / "report.html").read_text()
        assert words in page and re.search(rf"<th scope=\"row\">readout</th><td>{name}", page)
        signed = kind.name != "squared"
        assert found["opponents"].shape == (2, 4 if signed else 0)
        assert ("Opponents</h4>" in page) == signed and ("knows no opponents" in page) == (not signed)
        assert ("has no sign" in page) == (not signed)
    # Of the head, what was cut off is not shown.
    shown = re.findall(r'data-score="([^"]+)"', page)
    assert len(shown) == 2 * 3 and all(float(score) for score in shown)


def test_the_head_of_a_method_that_shows_where_images_match(attributed):
    cpu = ("--device", "cpu")
    out, _, found = attributed("-m", "nda", "--patch-timesteps", 1, "--readout", "head", "--percent", 5, settings=cpu)
    assert (np.count_nonzero(found["scores"], axis=1) == 2).all()
    page = (out / "report.html").read_text()
    best = np.argsort(-found["scores"], axis=1)[:, :2]
    assert [int(n) for n in re.findall(r'<figure class="pair" data-index="(\d+)"', page)] == best.ravel().tolist()
    assert [int(n) for n in re.findall(r'class="tile proponent" data-index="(\d+)"', page)] == best.ravel().tolist()


# Similarity


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("centre", [True, False])
def test_pixels(images, tmp_path, succeeds, arrays, train, similarity, centre):
    given = ["--similarity", similarity, "--centre" if centre else "--no-centre"]
    out = tmp_path / "out"
    succeeds("attribute", "--out", out, "--data", images, "--queries", images / "light", "-m", "pixels", *given)
    method = attribution.RawPixel(similarity, centre=centre).fit(train)
    found = arrays(out / "scores.npz")
    np.testing.assert_array_equal(found["scores"], method.scores(train[12:]))
    name = {"dot": "Pixel inner product", "cosine": "Pixel cosine"}[similarity] + ("" if centre else ", not centred")
    assert found["methods"].tolist() == [name] and found["opponents"].shape == (12, 0)
    page = (out / "report.html").read_text()
    assert ("after the mean training image is taken off" in page) == centre
    assert ("from 1 to −1" in page) == (similarity == "cosine")


def test_a_classifier_of_the_data_stands_in_for_clip(images, tmp_path, succeeds, arrays, train):
    out = tmp_path / "out"
    given = ["attribute", "--out", out, "--data", images, "--queries", images / "light", "--threads", 1]
    told = succeeds(*given, "-m", "clip-similarity", "--epochs", 2)
    labels = np.repeat([0, 1], 12)
    encoder = evaluation.Classifier(epochs=2).fit(train, labels).extractor
    method = attribution.CLIPSimilarity(encoder).fit(train)
    found = arrays(out / "scores.npz")
    np.testing.assert_array_equal(found["scores"], method.scores(train[12:]))
    assert found["methods"].tolist() == ["Classifier-feature similarity"]
    assert found["methods"][0].lower() == method.name.lower() and "1/3  Classifier" in told
    page = (out / "report.html").read_text()
    assert "trained on the labels of these images for 2 epochs" in page and "not CLIP" in page
    # Another similarity asks the same features.
    assert succeeds(*given, "-m", "clip-similarity", "--epochs", 2, "--similarity", "dot").count("found") == 2
    dots = attribution.CLIPSimilarity(encoder, "dot").fit(train).scores(train[12:])
    np.testing.assert_array_equal(arrays(out / "scores.npz")["scores"], dots)


def test_clip(images, tmp_path, succeeds, fails, arrays, train):
    transformers = pytest.importorskip("transformers", reason="comes with pyattr[evaluation] and pyattr[dev]")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 20, "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    out = tmp_path / "out"
    given = ["attribute", "--out", out, "--data", images, "--queries", images / "light", "-m", "clip-similarity"]
    fails(
        f"--clip must be a folder of transformers' CLIPModel, got {tmp_path}/none", *given, "--clip", tmp_path / "none"
    )
    succeeds(*given, "--threads", 1, "--clip", tmp_path / "clip")
    found = arrays(out / "scores.npz")
    method = attribution.CLIPSimilarity(weights=tmp_path / "clip").fit(train)
    np.testing.assert_array_equal(found["scores"], method.scores(train[12:]))
    assert found["methods"].tolist() == ["CLIP-feature similarity"]
    assert "stands in" not in (out / "report.html").read_text()


# Retraining


@pytest.fixture(scope="module")
def pool(train, tmp_path_factory):
    """A file of losses of twelve subsets' models; the queries are the bright images."""
    rng = np.random.default_rng(0)
    masks = np.array([rng.permutation(24) < 12 for _ in range(12)])
    path = tmp_path_factory.mktemp("pool") / "pool.safetensors"
    evaluation.GroundTruth(
        masks=masks,
        losses=rng.random((2, 12, 1, 2, 12)),
        targets=("simple", "elbo"),
        query_ids=np.arange(12),
        images=data_hash(train),
        queries=tuple(image_hashes(train[12:])),
        settings={},
    ).save(path)
    return path


def test_methods_of_retrained_models(images, tmp_path, succeeds, fails, arrays, train, pool):
    pytest.importorskip("sklearn", reason="comes with pyattr[evaluation] and pyattr[dev]")
    out = tmp_path / "out"
    given = ["attribute", "--out", out, "--data", images, "--queries", images / "light", "--pool", pool]
    succeeds(*given, "-m", "empirical-influence", "-m", "datamodel", "--target", "elbo")
    found, truth = arrays(out / "scores.npz"), evaluation.GroundTruth.open(pool)
    for number, kind in (("", attribution.EmpiricalInfluence), ("_2", attribution.Datamodel)):
        method = kind(truth, target="elbo").fit(train)
        np.testing.assert_array_equal(found[f"scores{number}"], method.scores(train[12:]))
    assert found["methods"].tolist() == ["Empirical influence", "Datamodel"]
    assert found["opponents"].shape == (12, 10)
    page = (out / "report.html").read_text()
    for words in ("12: 12 subsets, 1 of each", "must not be judged by the models that it has asked", "elbo"):
        assert words in page, words
    # Refused before anything is written.
    new = ["attribute", "--out", tmp_path / "new", "--pool", pool, "-m", "datamodel"]
    fails("Datamodel: train must be the 24 images of the ground truth, got 12",
          *new, "--data", images, "--limit", 12, "--queries", images / "light")  # fmt: skip
    fails("Datamodel: queries must be among those of the ground truth, in their dtype; number 0 is not",
          *new, "--data", images, "--queries", images / "dark")  # fmt: skip
    fails("GroundTruth: target must be one of simple, elbo, got 'l2'",
          *new, "--data", images, "--queries", images / "light", "--target", "l2")  # fmt: skip
    fails(f"--pool must be a file of pyattr.evaluation.build_ground_truth, got {tmp_path}/none",
          *new[:4], tmp_path / "none", *new[5:], "--data", images, "--queries", images)  # fmt: skip
    np.savez(tmp_path / "d.npz", images=train)
    fails(f"--pool must be a file of pyattr.evaluation.build_ground_truth, got {tmp_path}/d.npz, which is an .npz archive",
          *new[:4], tmp_path / "d.npz", *new[5:], "--data", images, "--queries", images)  # fmt: skip
