"""A Stable Diffusion pipeline of a few thousand parameters, built from its configuration and saved as diffusers saves it."""

import json

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("a", "red", "blue", "painting", "ukiyo", "e")
LENGTH = 8  # tokens of a prompt, with those that begin and end it
SIZE = 16  # of the images; their latents are half of that


def tokenizer(folder):
    """Letters, and the words above."""
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges, pieces = [], set(letters) | {f"{letter}</w>" for letter in letters}
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if f"{parts[0]} {parts[1]}" not in merges:
                merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
            pieces.add(parts[0])
    vocabulary = {piece: i for i, piece in enumerate([*sorted(pieces), "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=LENGTH), len(vocabulary)


def save_pipeline(folder, *, prediction_type="epsilon", unet=None, **scheduler):
    """The same pipeline each time, but for what is given; the folder."""
    torch.manual_seed(0)
    words, size = tokenizer(folder.parent / f"{folder.name}-words")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            projection_dim=16,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
        )
    )
    settings = {
        "sample_size": SIZE // 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        **(unet or {}),
    }
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            norm_num_groups=2,
            sample_size=SIZE,
        ),
        text_encoder=text_encoder,
        tokenizer=words,
        unet=UNet2DConditionModel(**settings),
        scheduler=DDIMScheduler(
            **{
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "clip_sample": False,
                "steps_offset": 1,
                "prediction_type": prediction_type,
                **scheduler,
            }
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return folder
