"""Tiny random pipelines in the layout that diffusers writes: real classes, real configs, real files, toy dimensions."""

from __future__ import annotations

from collections.abc import Callable
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


def t5(cls: Any, dim: int) -> tuple[Any, Any]:
    """A T5-like encoder of `cls` with `dim` channels, and its tokenizer."""
    from transformers import PreTrainedTokenizerFast, T5Config, UMT5Config

    config = {"T5EncoderModel": T5Config, "UMT5EncoderModel": UMT5Config}[cls.__name__]
    encoder = cls(
        config(vocab_size=32, d_model=dim, d_kv=8, d_ff=16, num_layers=1, num_heads=2, relative_attention_num_buckets=8)
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return encoder.eval(), words_tokenizer(PreTrainedTokenizerFast, list(names.values()), **names)


def randomised(model: Any) -> Any:
    """Every parameter random and none zero, so that an output depends on everything."""
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.8 / parameter[0].numel() ** 0.5)
            else:
                parameter.normal_(0, 0.1).add_(1.0 if "norm" in path and path.endswith("weight") else 0.0)
    return model.eval()


def wan(place: Path) -> None:
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
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=randomised(model),
    ).save_pretrained(place)


def pixart(place: Path) -> None:
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
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
    PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae.eval(),
        transformer=randomised(model),
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(place)


MAKERS: dict[str, Callable[[Path], None]] = {"WanPipeline": wan, "PixArtSigmaPipeline": pixart}


def pipeline_folder(name: str, place: Path) -> Path:
    """A folder of the pipeline class `name` at `place`."""
    torch.manual_seed(0)
    MAKERS[name](place)
    return place
