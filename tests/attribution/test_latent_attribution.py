"""Which paintings taught a LoRA: from a folder of a pipeline to scores, and what the scores are made of."""

import functools

import pytest
import torch
from tiny_pipeline import SIZE, save_pipeline

from pyattr.attribution import DTRAK, GAS, TRAK, GradientDot, JourneyTRAK, RawPixel
from pyattr.diffusion import Conditioned, Guided, checkpoints, features, latent, noise, sample, train
from pyattr.diffusion.features import FeatureMap
from pyattr.evaluation import build_ground_truth, lds, subsets
from pyattr.ops import sign_matrix

PROMPTS = latent.class_prompts("a {class} painting", ["red", "blue"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny")


def load(folder):
    torch.manual_seed(2)
    return latent.load(folder, PROMPTS, rank=2)


@pytest.fixture(scope="module")
def examples(folder):
    """Latents of six paintings, three red ones and three blue ones."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 100, (6, 3, SIZE, SIZE), generator=generator).to(torch.uint8)
    images[:3, 0] += 150
    images[3:, 2] += 150
    return latent.Codec(folder).encode(images, [0, 0, 0, 1, 1, 1], mirrored=True)


@pytest.fixture(scope="module")
def run(folder, examples, tmp_path_factory):
    """A trained model, and the folder of its checkpoints."""
    directory, model = tmp_path_factory.mktemp("run"), load(folder)
    options = {"steps": 6, "batch_size": 3, "learning_rate": 3e-2, "flip": True, "checkpoint_every": 3}
    train(model, examples, schedule=model.schedule, checkpoint_directory=directory, **options)
    return model, directory


@pytest.mark.parametrize("loss", ["simple", "square"])
def test_features_are_gradients_of_lora_alone(run, examples, loss):
    model = run[0].double()
    which = FeatureMap(model.schedule, loss=loss, num_timesteps=2, proj_dim=24, seed=4, noise_seed=7)
    ours = features.compute(model, examples[2:4], which, ids=[2, 3]).tensor()
    parameters = [p for p in model.parameters() if p.requires_grad]
    signs = sign_matrix(range(24), range(sum(p.numel() for p in parameters)), 4).double()
    for row, n in enumerate((2, 3)):
        total = 0
        for t in (0, 500):
            x, abar = examples.images[n].double(), model.schedule.alphas_cumprod[t]
            eps = noise(x.shape, seed=7, ids=n, timesteps=t).double()
            told = model.embeddings[examples.conditions[n]][None]
            noisy = abar.sqrt() * x + (1 - abar).sqrt() * eps
            e = model.unet(noisy[None], torch.tensor([t]), encoder_hidden_states=told).sample[0]
            value = (e if loss == "square" else e - eps).square().mean()
            grads = torch.autograd.grad(value, parameters)
            total = total + torch.cat([grad.flatten() for grad in grads]) / 2
        torch.testing.assert_close(ours[row], signs @ total)
    model.float()


def test_the_prompt_is_part_of_the_sample(run, examples):
    model = run[0]
    which = FeatureMap(model.schedule, num_timesteps=2, proj_dim=24)
    ours = features.compute(model, examples, which).tensor()
    other = features.compute(model, Conditioned(examples.images, 1 - examples.conditions), which).tensor()
    assert not torch.isclose(ours, other, rtol=1e-3).all(1).any()


def test_from_a_folder_to_scores(folder, run, examples, tmp_path):
    model, directory = run
    options = {"num_timesteps": 2, "proj_dim": 32}
    samples = sample(
        Guided(model, 3.0),
        model.schedule,
        num_images=2,
        conditions=[0, 1],
        steps=4,
        clip=False,
        record="trajectory",
    )
    # As published: the saved picture is asked about, so it goes through the autoencoder again.
    codec = latent.Codec(folder)
    queries = codec.encode(codec.decode(samples), samples.conditions)
    made = {}
    for method in (
        DTRAK(model, model.schedule, directory=tmp_path / "square", **options),
        TRAK(model, model.schedule, directory=tmp_path / "simple", **options),
        GradientDot(model, model.schedule, directory=tmp_path / "simple", **options),
        GAS(model, model.schedule, checkpoints=checkpoints(directory).values(), **options),
        RawPixel(),
    ):
        made[type(method)] = method.fit(examples).scores(queries)
        assert made[type(method)].shape == (2, 6) and made[type(method)].isfinite().all()
    journey = JourneyTRAK(model, model.schedule, **options).fit(examples).scores(samples)
    assert journey.shape == (2, 6) and not torch.isclose(journey, made[TRAK]).all()
    # What is written to disk and read again scores alike, and finds the features that are there.
    latent.save_lora(tmp_path / "lora", model)
    again = latent.load(folder, PROMPTS, lora=tmp_path / "lora")
    seen = []
    method = DTRAK(
        again, again.schedule, directory=tmp_path / "square", progress=lambda *news: seen.append(news), **options
    ).fit(examples)
    torch.testing.assert_close(method.scores(queries), made[DTRAK], rtol=0, atol=0)
    assert (0, 6, "features") not in seen and (6, 6, "features") in seen


def test_training_images_recognise_themselves(run, examples):
    model = run[0]
    method = DTRAK(model, model.schedule, num_timesteps=2, proj_dim=512, lambda_=1e-6).fit(examples)
    scores = method.scores(examples, ids=range(6))
    torch.testing.assert_close(scores, torch.eye(6), rtol=0, atol=0.2)


def test_ground_truth(folder, examples, tmp_path):
    masks = subsets(6, 3, labels=examples.conditions)
    options = {"schedule": load(folder).schedule, "timesteps": 2, "steps": 2, "batch_size": 2, "flip": True}
    queries = examples[torch.tensor([0, 4])]
    factory = functools.partial(latent.load, folder, PROMPTS, rank=1)
    truth = build_ground_truth(tmp_path, factory, examples, queries, masks, learning_rate=0.1, **options)
    outputs = truth.outputs()
    assert outputs.shape == (3, 2) and len(set(outputs[:, 0])) == 3
    score = lds(torch.randn(2, 6), truth.masks, outputs)
    assert score.per_query.shape == (2,)
