"""A Stable Diffusion pipeline from a folder, beside diffusers' own pipeline on the same folder."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from tiny_pipeline import LENGTH, SIZE, save_pipeline

from pyattr.attribution import DTRAK
from pyattr.diffusion import DamagedFileError, Guided, ScaledLinearSchedule, Schedule, latent, load_model, sample, train
from pyattr.diffusion.checkpoint import identity

PROMPTS = ["a red painting", "a blue painting"]
NUM_LORA = 1376  # rank 2: 2 (in + out) for each of 4 layers of 2 attentions of 4 blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny")


@pytest.fixture
def altered(folder, tmp_path):
    """The folder again, to be changed."""
    return shutil.copytree(folder, tmp_path / "altered")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(folder, rank=2, trained=True, **options):
    """A model whose B are not zero, as if trained."""
    torch.manual_seed(3)
    model = latent.load(folder, PROMPTS, rank=rank, **options)
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def pipeline(folder):
    return theirs(folder)


def theirs(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_what_is_trained(folder):
    model = load(folder, trained=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == NUM_LORA
    assert {name.split(".")[-4] for name in trained} == {"to_q", "to_k", "to_v", "0"}
    assert not any(p.any() for name, p in trained.items() if "lora_B" in name)
    spread = torch.cat([p.flatten() for name, p in trained.items() if "lora_A" in name]).std()
    assert float(spread.detach()) == pytest.approx(1 / 2, rel=0.1)  # 1 / rank
    assert not model.training and model.num_conditions == 2 and model.unconditional == 2
    assert model.schedule == ScaledLinearSchedule()
    # The loss reaches LoRA's weights and no other.
    model(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 1])).square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained)


def test_new_weights_change_nothing_and_follow_the_seed(folder, pipeline):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    model = load(folder, trained=False)
    told = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    torch.testing.assert_close(model.embeddings[:2], told)
    torch.testing.assert_close(model.embeddings[2:], pipeline.encode_prompt([""], "cpu", 1, False)[0])
    with torch.no_grad():
        expected = pipeline.unet(x, t, encoder_hidden_states=told).sample
        torch.testing.assert_close(model(x, t, torch.tensor([0, 1])), expected)
    assert identity(load(folder, trained=False)) == identity(model)
    torch.manual_seed(4)
    assert identity(latent.load(folder, PROMPTS, rank=2)) != identity(model)


@pytest.mark.parametrize(
    ("betas", "kind"), [("scaled_linear", ScaledLinearSchedule), ("linear", Schedule)], ids=["scaled", "linear"]
)
def test_schedule_is_that_of_the_folder(altered, betas, kind):
    edit(altered / "scheduler/scheduler_config.json", beta_schedule=betas, beta_start=0.001, num_train_timesteps=50)
    schedule, prediction = latent.read_schedule(altered)
    assert schedule == kind(50, 0.001, 0.012) and prediction == "epsilon"
    expected = DDIMScheduler.from_pretrained(altered, subfolder="scheduler").alphas_cumprod.double()
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=1e-5, atol=0)


def test_velocity_becomes_noise(altered):
    edit(altered / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    model, x, t = load(altered), torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    conditions = torch.tensor([0, 1])
    with torch.no_grad():
        velocity = model.unet(x, t, encoder_hidden_states=model.embeddings[conditions]).sample
        ours = model(x, t, conditions)
    abar = DDIMScheduler.from_pretrained(altered, subfolder="scheduler").alphas_cumprod[t][:, None, None, None]
    torch.testing.assert_close(ours, abar.sqrt() * velocity + (1 - abar).sqrt() * x, rtol=1e-4, atol=1e-5)
    assert identity(model)["network"]["prediction"] == "v_prediction"


def test_sampling_is_that_of_the_pipeline(folder, tmp_path):
    model = load(folder)
    samples = sample(
        Guided(model, 7.5), model.schedule, num_images=3, conditions=[0, 1, 1], steps=5, clip=False, batch_size=2
    )
    latent.save_lora(tmp_path, model)
    pipeline = theirs(folder)
    pipeline.load_lora_weights(tmp_path, local_files_only=True)
    # The published configuration visits t + 1 and ends at abar_0; ours visits t and ends without noise.
    config = {**pipeline.scheduler.config, "steps_offset": 0, "set_alpha_to_one": True}
    pipeline.scheduler = DDIMScheduler.from_config(config)
    expected = pipeline(
        [PROMPTS[0], PROMPTS[1], PROMPTS[1]],
        latents=samples.noise[:, 0].clone(),
        num_inference_steps=5,
        guidance_scale=7.5,
        output_type="latent",
        height=SIZE,
        width=SIZE,
    ).images
    torch.testing.assert_close(samples.images, expected, rtol=1e-3, atol=1e-3)
    assert (samples.images[1] - samples.images[0]).abs().max() > 0.1
    with torch.no_grad():
        pixels = pipeline.vae.decode(samples.images / pipeline.vae.config.scaling_factor).sample
    pictures = latent.Codec(folder, batch_size=2).decode(samples)
    assert pictures.dtype == torch.uint8 and pictures.shape == (3, 3, SIZE, SIZE)
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (pictures - expected).abs().max() <= 1  # a pixel near the middle of two levels may go either way
    with pytest.raises(ValueError, match="sample: clip must be False for a model of latents"):
        sample(Guided(model, 7.5), model.schedule, num_images=1, conditions=[0], steps=5)


def test_latents_are_the_mode_scaled(folder, pipeline, images):
    codec = latent.Codec(folder, batch_size=2)
    made = codec.encode(images, [0, 1, 0, 1, 0], mirrored=True)
    vae = pipeline.vae
    for side, ours in ((images, made.images), (images.flip(3), made.mirrored)):
        with torch.no_grad():
            expected = vae.encode(side / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert made.conditions.tolist() == [0, 1, 0, 1, 0]
    assert codec.encode(images, [0] * 5).mirrored is None


def test_latents_are_kept(folder, images, tmp_path, monkeypatch):
    from pyattr.diffusion.latent import codec as module

    monkeypatch.setattr(module, "_SHARD_ROWS", 2)
    codec = latent.Codec(folder, batch_size=2)

    def stop(done, total, stage):
        assert (total, stage) == (5, "latents")
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        codec.encode(images, [0] * 5, directory=tmp_path, progress=stop)
    seen = []
    made = codec.encode(images, [1] * 5, directory=tmp_path, progress=lambda *news: seen.append(news[0]))
    assert seen == [2, 4, 5]  # the first two were there
    torch.testing.assert_close(made.images, codec.encode(images, [0] * 5).images, rtol=1e-5, atol=1e-6)
    seen.clear()
    codec.encode(images, [1] * 5, directory=tmp_path, progress=lambda *news: seen.append(news[0]))
    assert seen == [5]
    with pytest.raises(ValueError, match="was made otherwise: mirrored was false, now true"):
        codec.encode(images, [1] * 5, directory=tmp_path, mirrored=True)


def test_checkpoints_hold_lora_alone_and_training_resumes(folder, images, tmp_path):
    examples = latent.Codec(folder).encode(images, [0, 1, 0, 1, 0], mirrored=True)
    options = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "flip": True, "checkpoint_every": 2}

    def run(directory, progress=lambda *news: None):
        model = load(folder, trained=False, dropout=0.1)
        frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        made = train(
            model, examples, schedule=model.schedule, checkpoint_directory=directory, progress=progress, **options
        )
        for name, parameter in frozen.items():
            assert torch.equal(model.get_parameter(name), parameter)
        return made

    def stop(done, total, stage):
        if done == 3:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop)
    again = run(tmp_path / "stopped")
    assert again.resumed_from == 2
    torch.testing.assert_close(again.losses, whole.losses, rtol=0, atol=0)
    assert identity(again.model) == identity(whole.model)
    file = tmp_path / "whole" / "checkpoint-00000004.safetensors"
    with safetensors.safe_open(file, "pt") as content:
        weights = [name for name in content.keys() if name.startswith("model.")]
        assert sum(content.get_tensor(name).numel() for name in weights) == NUM_LORA
    fresh = load(folder, trained=False, dropout=0.1)
    assert identity(load_model(tmp_path / "whole", into=fresh)) == identity(whole.model)


def test_dropout_is_behind_attention_and_only_while_training(folder):
    model = load(folder, dropout=0.5)
    given = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.p}
    assert len(given) == 8 and all(name.endswith("to_out.1") for name in given)
    arguments = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([0])
    torch.testing.assert_close(model(*arguments), load(folder)(*arguments))
    assert not torch.equal(model.train()(*arguments), model(*arguments))


def test_identity_sees_everything(folder):
    made = [load(folder), load(folder, alpha=1.0), load(folder, dropout=0.1), load(folder, rank=3)]
    other_prompts = load(folder)
    other_prompts.embeddings[0] += 1
    other_base, frozen = load(folder), load(folder)
    first = identity(other_base)
    with torch.no_grad():
        other_base.unet.conv_in.weight[0, 0, 0, 0] += 1
    assert identity(made[0]) == first
    next(p for p in frozen.parameters() if p.requires_grad).requires_grad_(False)
    found = [identity(model) for model in (*made, other_prompts, other_base, frozen)]
    assert len({json.dumps(one) for one in found}) == len(found)
    assert identity(Guided(made[0], 2.0)) == {**found[0], "guidance": 2.0}


def test_weights_that_no_checkpoint_would_hold_are_not_trained(folder, images):
    model = load(folder)
    model.unet.conv_in.weight.requires_grad_(True)
    examples = latent.Codec(folder).encode(images, [0] * 5)
    message = r"LatentModel: no weights but LoRA's may take a gradient, got unet\.conv_in\.weight"
    with pytest.raises(ValueError, match=message):
        train(model, examples, schedule=model.schedule, steps=1)
    with pytest.raises(ValueError, match=message):
        DTRAK(model, model.schedule, num_timesteps=1, proj_dim=4).fit(examples)


def test_a_state_of_something_else_is_refused(folder):
    model = load(folder)
    state = model.state_dict()
    missing = dict(list(state.items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(missing)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state, "unet.conv_in.weights": torch.zeros(1)})


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_lora_from_diffusers_file(folder, tmp_path, alpha):
    model = load(folder, alpha=alpha)
    latent.save_lora(tmp_path / "lora", model)
    latent.save_lora(tmp_path / "lora", model)  # replaces
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    for where in (tmp_path / "lora", tmp_path / "lora" / "pytorch_lora_weights.safetensors"):
        again = latent.load(folder, PROMPTS, lora=where)
        assert identity(again) == identity(model)


def test_lora_from_peft_folder(folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    wrapped = get_peft_model(
        unet, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=["to_q", "to_v"])
    )
    wrapped.save_pretrained(tmp_path / "lora")
    model, x, t = latent.load(folder, PROMPTS, lora=tmp_path / "lora"), torch.randn(1, 4, 8, 8), torch.tensor([3])
    with torch.no_grad():
        expected = wrapped.eval()(x, t, encoder_hidden_states=model.embeddings[:1]).sample
        torch.testing.assert_close(model(x, t, torch.tensor([0])), expected)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 2 * 8


def test_bad_lora(folder, tmp_path):
    def refused(error, message, where):
        with pytest.raises(error, match=message):
            latent.load(folder, PROMPTS, lora=where)

    refused(FileNotFoundError, "lora must be a file, or a folder with pytorch_lora_weights.safetensors", tmp_path)
    latent.save_lora(tmp_path, load(folder))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(iter(tensors))
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({**tensors, name.replace("unet", "text_encoder"): tensors[name].clone()}, other)
    refused(ValueError, "must hold LoRA weights of the U-Net and nothing else, got text_encoder", other)
    safetensors.torch.save_file({**tensors, name: torch.zeros(2, 5)}, other)
    refused(ValueError, "does not fit the U-Net: .*size mismatch", other)
    wrong = {name.replace("transformer_blocks.0", "transformer_blocks.7"): t for name, t in tensors.items()}
    safetensors.torch.save_file(wrong, other)
    refused(ValueError, "does not fit the U-Net", other)
    other.write_bytes(file.read_bytes()[:-9])
    refused(DamagedFileError, "is damaged", other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": "a red painting"}, TypeError, "prompts must be a list of strings, got a single one"),
        ({"prompts": []}, TypeError, r"prompts must be strings, and one at least, got \[\]"),
        ({"prompts": ["a", "a"]}, ValueError, "prompts must be distinct"),
        ({"prompts": ["a red red red red red painting"]}, ValueError, f"at most {LENGTH} tokens, got 9: 'a red"),
        ({"rank": None}, ValueError, "give either rank, for new LoRA weights, or lora"),
        ({"lora": "x"}, ValueError, "give either rank, for new LoRA weights, or lora"),
        ({"rank": None, "lora": "x", "alpha": 1}, ValueError, "alpha goes with rank"),
        ({"rank": 0}, ValueError, "rank must be an integer of at least 1, got 0"),
        ({"rank": 1.5}, ValueError, "rank must be an integer of at least 1, got 1.5"),
        ({"alpha": 0}, ValueError, "alpha must be positive, got 0"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_bad_options(folder, options, error, message):
    options = {"prompts": PROMPTS, "rank": 2, **options}
    with pytest.raises(error, match=f"latent.load: .*{message}"):
        latent.load(folder, **options)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "must hold a StableDiffusionPipeline, got FluxPipeline"),
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "the vae of .* must be a AutoencoderKL, got VQModel"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}, "linear, got squaredcos_cap_v2"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "got betas of its own"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "must not be rescaled to zero signal"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "epsilon, v_prediction, got sample"),
        ("scheduler/scheduler_config.json", {"beta_end": None},
         "read_schedule: the scheduler of .* must say num_train_timesteps, beta_start, beta_end, got beta_end None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_folders_of_another_kind(altered, file, changes, message):
    edit(altered / file, **changes)
    with pytest.raises(ValueError, match=message):
        latent.load(altered, PROMPTS, rank=2)


def test_networks_of_another_kind(tmp_path):
    inpainting = save_pipeline(tmp_path / "inpainting", unet={"in_channels": 9})
    with pytest.raises(ValueError, match="must have as many inputs as outputs, got 9 and 4 channels"):
        latent.load(inpainting, PROMPTS, rank=2)
    told_more = save_pipeline(tmp_path / "classes", unet={"class_embed_type": "timestep"})
    with pytest.raises(ValueError, match="must take nothing but a prompt, got class_embed_type 'timestep'"):
        latent.load(told_more, PROMPTS, rank=2)
    wide = save_pipeline(tmp_path / "wide", unet={"cross_attention_dim": 24})
    with pytest.raises(ValueError, match="the text encoder's width 16, got 24"):
        latent.load(wide, PROMPTS, rank=2)


def test_missing_folders(altered, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a diffusers pipeline: .*model_index.json"):
        latent.load(tmp_path / "none", PROMPTS, rank=2)
    shutil.rmtree(altered / "vae")
    with pytest.raises(FileNotFoundError, match=r"Codec: .* has no folder vae"):
        latent.Codec(altered)
    (altered / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index.json is damaged"):
        latent.Codec(altered)


def test_bad_images(folder, images):
    codec = latent.Codec(folder)
    with pytest.raises(ValueError, match=r"at least one of 3 channels with sides that are multiples of 2, got .*1, 16"):
        codec.encode(images[:, :1], [0] * 5)
    with pytest.raises(ValueError, match=r"multiples of 2, got shape \[5, 3, 15, 16\]"):
        codec.encode(images[:, :, 1:], [0] * 5)
    with pytest.raises(ValueError, match=r"multiples of 2, got shape \[0, 3, 16, 16\]"):
        codec.encode(images[:0], [])
    with pytest.raises(ValueError, match=r"conditions must be 5, one for each image, got shape \[4\]"):
        codec.encode(images, [0] * 4)
    with pytest.raises(ValueError, match=r"latents must have shape \[N, 4, h, w\], got \[5, 3, 16, 16\]"):
        codec.decode(images)
    with pytest.raises(ValueError, match="Codec: batch_size must be at least 1, got 0"):
        latent.Codec(folder, batch_size=0)
    assert codec.decode(torch.empty(0, 4, 8, 8)).shape == (0, 3, 16, 16)


def test_prompts():
    assert latent.class_prompts("a {class} painting", ["ukiyo_e", "red"]) == ["a ukiyo e painting", "a red painting"]
    with pytest.raises(ValueError, match=r"template must have a place {class}, got 'a painting'"):
        latent.class_prompts("a painting", ["red"])
    prompts, numbers = latent.index_prompts(["b", "a", "b", "c"])
    assert prompts == ["b", "a", "c"] and numbers.tolist() == [0, 1, 0, 2]
