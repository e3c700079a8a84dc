"""Tiny random pipelines that make sound with their pictures (LTX-2, MiniMax-H3)."""

from __future__ import annotations

from pathlib import Path

from tests.generate.tiny_parts import randomised, words_tokenizer


def ltx2(place: Path) -> None:
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

    text = {
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    encoder = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28}, image_token_id=3)
    )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    # what every layer says of a prompt, and its embedding, is one vector for the connectors
    connectors = LTX2TextConnectors(
        caption_channels=8,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
        rope_type="split",
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(4, 8, 16, 16),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae = AutoencoderKLLTX2Audio(base_channels=8, num_res_blocks=1, latent_channels=2, mel_bins=16)
    vocoder = LTX2Vocoder(
        in_channels=32,
        hidden_channels=32,
        upsample_kernel_sizes=[20, 32],
        upsample_factors=[10, 16],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
        output_sampling_rate=16000,
    )
    model = LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        caption_channels=8,
        num_layers=2,
        rope_type="split",
    )
    LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=words_tokenizer(PreTrainedTokenizerFast, list(names.values()), **names),
        connectors=randomised(connectors),
        transformer=randomised(model),
        vocoder=randomised(vocoder),
    ).save_pretrained(place)
