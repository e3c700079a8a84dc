"""Tiny random pipelines in the layout that diffusers writes: real classes, real configs, real files, toy dimensions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["a", "red", "ball", "rolls", "over", "the", "sea", "of", "glass", "slowly", "blue", "cube"]


def words_tokenizer(cls: Any, special: list[str], **names: Any) -> Any:
    """A tokenizer of class `cls` that knows a dozen words: every word is one token."""
    vocab = {word: index for index, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token=special[-1]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return cls(tokenizer_object=inner, **names)


def t5(cls: Any, dim: int, vocab: int = 32) -> tuple[Any, Any]:
    """A T5-like encoder of `cls` with `dim` channels, and its tokenizer."""
    from transformers import PreTrainedTokenizerFast, T5Config, UMT5Config

    config = {"T5EncoderModel": T5Config, "UMT5EncoderModel": UMT5Config}[cls.__name__]
    encoder = cls(
        config(
            vocab_size=vocab, d_model=dim, d_kv=8, d_ff=16, num_layers=1, num_heads=2, relative_attention_num_buckets=8
        )
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return encoder.eval(), words_tokenizer(PreTrainedTokenizerFast, list(names.values()), **names)


def bytes_tokenizer(template: str) -> Any:
    """Qwen's tokenizer with no merges: every byte is one token. `template`: of a chat, Jinja."""
    from transformers import Qwen2Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = template
    return tokenizer


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_text(dim: int) -> dict[str, Any]:
    """Settings of the language model inside Qwen2.5-VL with `dim` channels, one layer per hidden state that is taken."""
    return {
        "vocab_size": 264,
        "hidden_size": dim,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]},
        "pad_token_id": 256,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }


def randomised(model: Any) -> Any:
    """Every parameter random and none zero, so that an output depends on everything."""
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.8 / parameter[0].numel() ** 0.5)
            else:
                parameter.normal_(0, 0.1).add_(1.0 if "norm" in path and path.endswith("weight") else 0.0)
    return model.eval()


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
}


def pipeline_folder(name: str, place: Path) -> Path:
    """A folder of the pipeline class `name` at `place`."""
    torch.manual_seed(0)
    MAKERS[name](place)
    return place
