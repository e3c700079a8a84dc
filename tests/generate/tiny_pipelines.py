"""Tiny random pipelines in the layout that diffusers writes: real classes, real configs, real files, toy dimensions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.generate.tiny_parts import CHAT, bytes_tokenizer, qwen_text, randomised, t5, words_tokenizer
from tests.generate.tiny_sound import ltx2, minimax_h3


def wan(place: Path, experts: int = 1) -> None:
    """With two `experts` as Wan 2.2: the second transformer makes the steps below 7 tenths of the noise."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    encoder, tokenizer = t5(UMT5EncoderModel, 12)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 12,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
    }
    models = [randomised(WanTransformer3DModel(**settings)) for _ in range(experts)]
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=models[0],
        transformer_2=models[1] if experts == 2 else None,
        boundary_ratio=0.7 if experts == 2 else None,
    ).save_pretrained(place)


def pixart(name: str, place: Path) -> None:
    import diffusers
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
    from transformers import T5EncoderModel

    encoder, tokenizer = t5(T5EncoderModel, 12)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae.eval(),
        transformer=randomised(model),
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(place)


def hunyuan_video15(place: Path) -> None:
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5EncoderModel

    glyphs, _ = t5(T5EncoderModel, 10, vocab=384)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    )
    model = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=12,
        text_embed_2_dim=10,
        image_embed_dim=14,
        rope_axes_dim=(4, 6, 6),
        task_type="t2v",
    )
    HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**qwen_text(12))).eval(),
        tokenizer=bytes_tokenizer(CHAT),
        text_encoder_2=glyphs,
        tokenizer_2=ByT5Tokenizer(),
        vae=vae.eval(),
        transformer=randomised(model),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    ).save_pretrained(place)


def qwen_image(place: Path) -> None:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 12}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=qwen_text(12), vision_config=vision))
    vae = AutoencoderKLQwenImage(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    QwenImagePipeline(
        text_encoder=encoder.eval(),
        tokenizer=bytes_tokenizer(CHAT),
        vae=vae.eval(),
        transformer=randomised(model),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ).save_pretrained(place)


def flux2_parts() -> dict[str, Any]:
    """What FLUX.2 and its Klein share: all but the text encoder."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=64
    )
    with torch.no_grad():
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    model = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {"vae": vae.eval(), "transformer": randomised(model), "scheduler": scheduler}


def flux2(place: Path) -> None:
    from diffusers import Flux2Pipeline
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
        PreTrainedTokenizerFast,
    )

    vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    # the prompt is what layers 10, 20 and 30 say
    text = {
        "model_type": "mistral",
        "vocab_size": 32,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 30,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            vision_config={**vision, "num_attention_heads": 1, "image_size": 32},
            text_config=text,
            image_token_index=3,
        )
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = words_tokenizer(
        PreTrainedTokenizerFast, [*names.values(), "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<unk>"], **names
    )
    Flux2Pipeline(
        text_encoder=encoder.eval(),
        tokenizer=PixtralProcessor(PixtralImageProcessor(), words, chat_template=PIXTRAL_CHAT),
        **flux2_parts(),
    ).save_pretrained(place)


def flux2_klein(place: Path) -> None:
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    # the prompt is what layers 9, 18 and 27 say
    config = Qwen3Config(
        vocab_size=264,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=27,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
    )
    Flux2KleinPipeline(
        text_encoder=Qwen3ForCausalLM(config).eval(), tokenizer=bytes_tokenizer(CHAT), **flux2_parts()
    ).save_pretrained(place)


PIXTRAL_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }} {% endfor %}</s>{% endfor %}"
)

MAKERS: dict[str, Callable[[Path], None]] = {
    "WanPipeline": wan,
    "PixArtSigmaPipeline": partial(pixart, "PixArtSigmaPipeline"),
    "PixArtAlphaPipeline": partial(pixart, "PixArtAlphaPipeline"),
    "HunyuanVideo15Pipeline": hunyuan_video15,
    "QwenImagePipeline": qwen_image,
    "Flux2Pipeline": flux2,
    "Flux2KleinPipeline": flux2_klein,
    "LTX2Pipeline": ltx2,
    "MiniMaxH3ModularPipeline": minimax_h3,
}


def pipeline_folder(name: str, place: Path) -> Path:
    """A folder of the pipeline class `name` at `place`."""
    torch.manual_seed(0)
    MAKERS[name](place)
    return place
