"""Several models, models of latents, and methods of `pyattr attribute` that ask a model in ways of their own."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import SIZE, save_pipeline
from toy_runs import SCHEDULE, SCORE, SETTINGS

from pyattr import attribution, diffusion
from pyattr.attribution import Readout
from pyattr.cli.options import AVERAGED, LATENT
from pyattr.diffusion import latent
from pyattr.diffusion.conditioned import examples_hash
from pyattr.evaluation import GroundTruth, lds, subsets
from pyattr.evaluation.ground_truth import image_hashes


def samples_of(out):
    samples = diffusion.Samples.load(next(out.glob("generate-*")) / "samples-00000000.safetensors")
    return samples.uint8(), attribution.QUERY_IDS + samples.ids


def told(found):
    return json.loads(str(found["settings"]))["methods"][0]


# Methods


def test_probed_das(copied, train, succeeds, arrays):
    given = ["attribute", "--out", copied, "--top", 4, *SCORE, "--lambda", 0.5]
    first = succeeds(*given, "-m", "trak", "--no-report")
    assert "Gradients along directions" not in first
    said = succeeds(*given, "-m", "probed-das", "--probes", 3, "--train-probes", 2)
    assert "TRAK features" in said and said.count("found") == 1  # those of TRAK
    queries, ids = samples_of(copied)
    model = diffusion.load_model(next(copied.glob("train-*")))
    method = attribution.ProbedDAS(model, SCHEDULE, probes=3, train_probes=2, lambda_=0.5, **SETTINGS).fit(train)
    expected = method.scores(queries, ids=ids).numpy()
    found = arrays(copied / "scores.npz")
    np.testing.assert_array_equal(found["scores"], expected)
    assert found["methods"].tolist() == ["ProbedDAS"] and found["opponents"].shape == (2, 0)
    assert told(found)["readout"]["name"] == "squared" and told(found)["probes"] == 3
    page = (copied / "report.html").read_text()
    for words in (
        "ProbedDAS knows no opponents",
        "2 at each timestep of a training image, 3 of a query",
        "mean squared change",
    ):
        assert words in page, words
    # Asked for by name, it is what it is, and not squared again.
    again = succeeds(*given, "-m", "probed-das", "--probes", 3, "--train-probes", 2, "--readout", "squared")
    assert "to do" not in again
    np.testing.assert_array_equal(arrays(copied / "scores.npz")["scores"], expected)
    # More directions of a query ask nothing more of the training images.
    more = succeeds(*given, "-m", "probed-das", "--probes", 4, "--train-probes", 2, "--no-report")
    assert more.count("found") == 2 and more.count("to do") == 1


def test_what_probed_das_refuses(copied, fails):
    given = ["attribute", "--out", copied, *SCORE, "-m", "probed-das"]
    for name in ("signed", "signed-squared"):
        fails(
            "attribute: probed-das is a mean of squares, which has no sign: leave --readout away, or give squared",
            *given, "--readout", name,
        )  # fmt: skip
    fails("attribute: probed-das is of gradients in their own size: leave --normalize away", *given, "--normalize")
    fails(
        "Invalid value for --solve-dtype: goes with dtrak, das, trak, journey-trak, relative-influence, "
        "renormalized-influence, got probed-das",
        *given, "--solve-dtype", "float32", code=2,
    )  # fmt: skip
    fails(
        "Invalid value for --solve-dtype: must be one of float64, float32, got float16",
        *given, "-m", "trak", "--solve-dtype", "float16", code=2,
    )  # fmt: skip


def test_the_published_arithmetic(copied, train, succeeds, arrays):
    given = ["attribute", "--out", copied, "--top", 4, *SCORE, "--lambda", 0.5, "-m", "trak"]
    succeeds(*given, "--no-report")
    exact = arrays(copied / "scores.npz")["scores"]
    said = succeeds(*given, "--solve-dtype", "float32")
    assert said.count("found") == 1 and said.count("to do") == 1
    queries, ids = samples_of(copied)
    model = diffusion.load_model(next(copied.glob("train-*")))
    method = attribution.TRAK(model, SCHEDULE, solve_dtype=torch.float32, lambda_=0.5, **SETTINGS).fit(train)
    found = arrays(copied / "scores.npz")
    np.testing.assert_array_equal(found["scores"], method.scores(queries, ids=ids))
    assert not np.array_equal(found["scores"], exact)
    assert found["methods"].tolist() == ["TRAK, float32 inverse"] and told(found)["solve_dtype"] == "float32"
    assert "at small lambda these scores are noise" in (copied / "report.html").read_text()


# Several models


def checkpoints(out):
    return list(diffusion.checkpoints(next(out.glob("train-*"))).values())


@pytest.mark.parametrize(("name", "kind", "own"), [
    ("dtrak", attribution.DTRAK, {}),
    ("das", attribution.DAS, {"squared": False}),
    ("gradient-cosine", attribution.GradientCosine, {}),
])  # fmt: skip
def test_the_mean_over_models(copied, images, train, tmp_path, succeeds, arrays, name, kind, own):
    files = checkpoints(copied)[1:]
    np.savez(tmp_path / "queries.npz", images=train[:3, 0].numpy())
    given = [
        "attribute",
        "--out",
        tmp_path / "out",
        "--data",
        images,
        "--queries",
        tmp_path / "queries.npz",
        "-m",
        name,
    ]
    models = [argument for file in files for argument in ("--checkpoint", file)]
    said = succeeds(*given, *models, *SCORE, "--top", 4)
    methods = [kind(diffusion.load_model(file), SCHEDULE, **own, **SETTINGS) for file in files]
    expected = attribution.Ensemble(methods).fit(train).scores(train[:3])
    expected = Readout("squared")(expected) if name == "das" else expected
    found = arrays(tmp_path / "out" / "scores.npz")
    np.testing.assert_array_equal(found["scores"], expected)
    if name == "das":  # of the mean, which is not the mean of the squares
        squares = (methods[0].scores(train[:3]) ** 2 + methods[1].scores(train[:3]) ** 2) / 2
        assert (found["scores"] <= squares.numpy() * (1 + 1e-5)).all() and not np.allclose(found["scores"], squares)
    assert found["methods"][0].endswith(", mean of 2 models") and ", model 2" in said
    if name == "dtrak":
        assert told(found)["lambda"] == [method.lambda_ for method in methods] and told(found)["models"] == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "estimates for 2 trained models" in page and "one trained model" not in page
    # Each model's part is found again, alone and by its side.
    alone = succeeds(*given, *models[2:], *SCORE, "--no-report")
    assert "to do" not in alone
    again = succeeds(*given, *models, *SCORE, "--no-report", "--readout", "signed-squared")
    assert "to do" not in again


def test_models_that_have_no_mean(copied, images, tmp_path, fails):
    files = checkpoints(copied)
    given = ["attribute", "--out", tmp_path / "out", "--data", images, "--queries", images, *SCORE]
    several = ["--checkpoint", files[0], "--checkpoint", files[1]]
    for name in ("tracincp", "journey-trak"):
        fails(
            f"Invalid value for --checkpoint: several go with {', '.join(AVERAGED)}, got {name}",
            *given, "-m", name, *several, code=2,
        )  # fmt: skip
    fails(f"{files[0]} and {files[0]} are the same model: give each once", *given, *several[:2] * 2)
    other = diffusion.Schedule(num_timesteps=500)
    diffusion.save_model(tmp_path / "other.safetensors", diffusion.load_model(files[0]), schedule=other)
    fails(
        f"{tmp_path / 'other.safetensors'} and {files[0]} were trained with different noise schedules: score by one after the "
        "other",
        *given, *several[:2], "--checkpoint", tmp_path / "other.safetensors",
    )  # fmt: skip


def test_models_of_other_images_are_refused_before_any_work(copied, images, tmp_path, succeeds, fails):
    np.savez(tmp_path / "large.npz", images=np.random.default_rng(0).integers(0, 256, (8, 16, 16), np.uint8))
    steps = ["--steps", 1, "--batch-size", 4, "--threads", 1, "--device", "cpu"]
    succeeds("train", tmp_path / "large.npz", "--out", tmp_path / "large", *steps)
    first, large = checkpoints(copied)[0], checkpoints(tmp_path / "large")[0]
    given = ["attribute", "--out", tmp_path / "out", "--data", images, "--queries", images, *SCORE]
    fails(
        f"{large} is a model of images of 1×16×16, and {first} of 1×8×8: score by one after the other",
        *given, "--checkpoint", first, "--checkpoint", large,
    )  # fmt: skip
    network = diffusion.load_model(first)
    nameless = torch.nn.Sequential(network)  # of no kind that a file describes
    diffusion.save_model(tmp_path / "nameless.safetensors", nameless, schedule=SCHEDULE)
    fails(
        f"{tmp_path}/nameless.safetensors does not say how its network is built: write it again by "
        "pyattr.diffusion.save_model, of a diffusers UNet2DModel or a preset",
        *given, "--checkpoint", first, "--checkpoint", tmp_path / "nameless.safetensors",
    )  # fmt: skip


# Models of latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny")


@pytest.fixture(scope="module")
def paintings(tmp_path_factory):
    """Six paintings in two classes."""
    home = tmp_path_factory.mktemp("paintings")
    rng = np.random.default_rng(1)
    for number in range(6):
        pixels = rng.integers(0, 100, (SIZE, SIZE, 3), np.uint8)
        name = ("blue", "red")[number // 3]
        pixels[..., 0 if name == "red" else 2] += 150
        (home / name).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(home / name / f"{number}.png")
    return home


@pytest.fixture(scope="module")
def weights(folder, tmp_path_factory):
    """LoRA weights of two models, and the file of their prompts."""
    home = tmp_path_factory.mktemp("lora")
    prompts = {"red": "a red painting", "blue": "a blue painting"}
    (home / "prompts.json").write_text(json.dumps(prompts))
    for number in range(2):
        torch.manual_seed(number)
        model = latent.load(folder, list(prompts.values()), rank=2)
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.data.normal_(std=0.1)
        latent.save_lora(home / str(number), model)
    return home


@pytest.fixture(scope="module")
def asked(paintings, tmp_path_factory):
    """The red ones again, in a folder of their class."""
    home = tmp_path_factory.mktemp("asked")
    shutil.copytree(paintings / "red", home / "red")
    return home


@pytest.fixture
def command(folder, paintings, asked, weights, tmp_path):
    return [
        "attribute", "--out", tmp_path / "out", "--data", paintings, "--queries", asked, "--pipeline", folder,
        "--prompts", weights / "prompts.json", *SCORE, "--top", 2,
    ]  # fmt: skip


def encoded(folder, paintings):
    """The training images and the red ones, as the model takes them."""
    files = [file for name in ("blue", "red") for file in sorted((paintings / name).iterdir())]
    pixels = (
        torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2).contiguous()
    )
    codec = latent.Codec(folder)
    return codec.encode(pixels, [1, 1, 1, 0, 0, 0]), codec.encode(pixels[3:], [0, 0, 0])


def test_from_a_pipeline_to_scores(command, folder, paintings, weights, tmp_path, succeeds, arrays):
    out = tmp_path / "out"
    said = succeeds(*command, "--lora", weights / "0", "-m", "dtrak", "-m", "pixels")
    assert "1/4  Latents" in said and "6 images and 3 queries, 256 numbers each" in said
    assert "nobody checked" in said
    train, queries = encoded(folder, paintings)
    model = latent.load(folder, ["a red painting", "a blue painting"], lora=weights / "0")
    method = attribution.DTRAK(model, model.schedule, **SETTINGS).fit(train)
    found = arrays(out / "scores.npz")
    np.testing.assert_array_equal(found["scores"], method.scores(queries))
    assert found["queries"].shape == (3, 3, SIZE, SIZE) and found["ids"][0] == "blue/0.png"
    assert found["images_hash"] == examples_hash(train) and found["query_hashes"].tolist() == image_hashes(queries)
    page = (out / "report.html").read_text()
    for words in (str(folder), "a red painting, … (2 of them)", "linear in their roots, 0.00085 to 0.012"):
        assert words in page, words
    # A run again finds all of it; other LoRA weights find the latents.
    assert "to do" not in succeeds(*command, "--lora", weights / "0", "-m", "dtrak", "--no-report")
    other = succeeds(*command, "--lora", weights / "1", "-m", "dtrak", "--no-report")
    assert other.count("found") == 1 and other.count("to do") == 2
    assert not np.array_equal(arrays(out / "scores.npz")["scores"], found["scores"])
    # Both together are the mean, and what the ground truth of these latents judges.
    succeeds(*command, "--lora", weights / "0", "--lora", weights / "1", "-m", "dtrak", "--no-report")
    both = arrays(out / "scores.npz")["scores"]
    second = latent.load(folder, ["a red painting", "a blue painting"], lora=weights / "1")
    methods = [attribution.DTRAK(each, each.schedule, **SETTINGS) for each in (model, second)]
    np.testing.assert_array_equal(both, attribution.Ensemble(methods).fit(train).scores(queries))
    losses = np.random.default_rng(0).standard_normal((1, 8, 1, 1, 3))
    truth = GroundTruth(
        subsets(6, 8), losses, ("simple",), np.arange(3), examples_hash(train), tuple(image_hashes(queries)), {}
    )
    truth.save(tmp_path / "truth.safetensors")
    succeeds("evaluate", "lds", "--truth", tmp_path / "truth.safetensors", out, "--json", tmp_path / "x.json")
    (row,) = json.loads((tmp_path / "x.json").read_text())["targets"]["simple"]["all"]
    assert row["lds"] == pytest.approx(100 * lds(both, truth.masks, truth.outputs()).mean, rel=1e-4)


def test_the_prompt_of_an_image_comes_first(command, weights, tmp_path, succeeds, arrays):
    out = tmp_path / "out"
    succeeds(*command, "--lora", weights / "0", "-m", "gradient-dot", "--no-report")
    before = arrays(out / "scores.npz")["scores"]
    prompts = {"red": "a red painting", "blue": "a blue painting", "blue/1.png": "a red painting"}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    given = [*command, "--lora", weights / "0", "--prompts", tmp_path / "prompts.json", "-m", "gradient-dot"]
    said = succeeds(*given, "--no-report")
    assert "1/3  Latents" in said and said.count("found") == 1  # latents do not depend on prompts
    after = arrays(out / "scores.npz")["scores"]
    assert not np.isclose(after[:, 1], before[:, 1], rtol=1e-3).any()
    np.testing.assert_array_equal(np.delete(after, 1, 1), np.delete(before, 1, 1))


def test_what_models_of_latents_lack(command, asked, weights, tmp_path, fails):
    lora = ["--lora", weights / "0"]
    fails("Invalid value for --lora: goes with --pipeline, --lora, --prompts together, got --pipeline, --prompts alone",
          *command, code=2)  # fmt: skip
    fails(
        f"Invalid value for --pipeline: goes with {', '.join(LATENT)}, got nda",
        *command,
        *lora,
        "-m",
        "dtrak",
        "-m",
        "nda",
        code=2,
    )
    fails("Invalid value for --checkpoint: goes without --pipeline, whose model is another, got both",
          *command, *lora, "--checkpoint", "x", code=2)  # fmt: skip
    without = [each for each in command if each not in ("--queries", asked)]
    fails("Invalid value for --queries: must be given with --pipeline, got none", *without, *lora, code=2)
    path = tmp_path / "prompts.json"
    given = [*command, *lora, "--prompts", path]
    fails(f"--prompts must be a JSON file, got {path} ([Errno 2] No such file or directory: '{path}')", *given)
    path.write_text("[1]")
    fails(
        f'--prompts must hold prompts by class or image, as in {{"ukiyo_e": "a ukiyo e painting"}}, got {path}', *given
    )
    path.write_text('{"red": "a red painting"}')
    fails(f"--prompts {path} holds none for blue/0.png or its class blue", *given)
    path.write_text('{"red": "a red painting", "blue": "a blue painting"}')
    fails(
        f"latent.load: lora must be a file, or a folder with pytorch_lora_weights.safetensors or adapter_config.json, got "
        f"{tmp_path / 'none'}",
        *command, "--lora", tmp_path / "none",
    )  # fmt: skip
