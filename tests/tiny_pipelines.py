"""Pipelines of diffusers as small as they come, with random weights, saved as anybody's are: Stable
Diffusion, SDXL, SD3 and DiT.
"""

import json
import string

import diffusers
import torch
import transformers

SIDE = 8  # of a latent
LETTERS = sorted(set(string.ascii_lowercase + string.digits + "!',.-"))


def shake(net, size=0.3, seed=0):
    "The same network with weights that make a difference."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(
                size
                * p.std().nan_to_num(0.1).clamp(0.02)
                * torch.randn(p.shape, generator=generator)
            )
    return net.eval()


def clip_tokenizer(folder):
    "A tokenizer that knows single letters."
    folder.mkdir(parents=True, exist_ok=True)
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: k for k, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(str(folder), model_max_length=77), len(vocab)


def clip_encoder(size, words, projected=False):
    "A text encoder of two layers."
    config = transformers.CLIPTextConfig(
        vocab_size=words,
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=size,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return shake(kind(config))


def autoencoder(channels=4, **more):
    "An autoencoder that halves twice."
    return shake(
        diffusers.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=channels,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=2 * SIDE,
            **more,
        )
    )


def text_unet(width, **more):
    "A UNet that reads text."
    return shake(
        diffusers.UNet2DConditionModel(
            sample_size=SIDE,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            cross_attention_dim=width,
            **more,
        )
    )


SD_TABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def stable_diffusion(folder, **scheduler):
    "Stable Diffusion 1 or 2, by the prediction type."
    tokenizer, words = clip_tokenizer(folder / "words")
    scheduler = (
        SD_TABLE | dict(steps_offset=1, set_alpha_to_one=False, clip_sample=False) | scheduler
    )
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(scaling_factor=0.18215),
        text_encoder=clip_encoder(16, words),
        tokenizer=tokenizer,
        unet=text_unet(16),
        scheduler=diffusers.DDIMScheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(folder):
    "SDXL: two encoders, a pooled one and six numbers about the frame."
    tokenizer, words = clip_tokenizer(folder / "words")
    more = dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 6 * 4,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=clip_encoder(16, words),
        text_encoder_2=clip_encoder(24, words, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=text_unet(40, **more),
        scheduler=diffusers.EulerDiscreteScheduler(**SD_TABLE, steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def stable_diffusion_3(folder, shift=3.0):
    "SD3 without its T5 encoder, as people with small machines load it."
    tokenizer, words = clip_tokenizer(folder / "words")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        pos_embed_max_size=SIDE,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=shake(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=autoencoder(
            16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip_encoder(16, words, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(24, words, projected=True),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def dit(folder):
    "DiT: ten classes and one for none, with a learned variance."
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_embeds_ada_norm=1000,
    )
    return diffusers.DiTPipeline(
        transformer=shake(transformer),
        vae=autoencoder(scaling_factor=0.18215),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        id2label={k: f"thing {k}" for k in range(1000)},
    )
