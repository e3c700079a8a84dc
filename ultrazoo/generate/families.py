"""How each family of pipelines is called: arguments, sizes, guidance, and what comes back from its decoder.

Torch-free, and no pipeline is imported: a family is known by the class name in ``model_index.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal


@dataclass(frozen=True)
class Request:
    """What is asked for. Sizes in pixels; `guidance` None keeps the pipeline's own."""

    prompt: str
    width: int
    height: int
    frames: int
    steps: int
    guidance: float | None = None
    negative: str | None = None


Arguments = Callable[[Request], dict[str, Any]]
Picked = Callable[[Any], Any]
Settings = Mapping[str, Any]
Strides = Callable[[Settings], "tuple[int | None, int, int] | None"]


def _same(decoded: Any) -> Any:
    return decoded


def _videos(pipeline: Any, decoded: Any) -> Any:
    """(B, F, H, W, 3) in [0, 1]."""
    return pipeline.video_processor.postprocess_video(decoded, output_type="np")


def _images(pipeline: Any, decoded: Any) -> Any:
    """(B, H, W, 3) in [0, 1]."""
    return pipeline.image_processor.postprocess(decoded, output_type="np")


@dataclass(frozen=True)
class Family:
    """Pipelines of one model: `pipelines` by class name, the model class inside, and how they are called.

    `strides` reads the VAE's over (T, H, W) in its settings, None where they do not say and for the frames of images.
    `picked` takes what the pipeline takes of the VAE's output. `audio`: whether an audio VAE decodes after the video's.
    `guider`: the guidance scale belongs to a guider component. `distilled`: guidance is in the weights, and no scale or
    negative prompt is taken. `negative`: whether the pipeline takes a negative prompt. `lengths`: least and most frames
    that the pipeline makes. `unused`: parts that its folder may hold for other tasks.

    For the memory estimate: `channels` of the VAE decoder's widest full-resolution layer, `frames_at_once`: whether it
    decodes all frames together, `doubled`: whether guidance doubles the batch of one forward.
    """

    name: str
    pipelines: tuple[str, ...]
    model: str
    kind: Literal["video", "image"]
    arguments: Arguments
    strides: Strides
    fps: float = 16.0
    picked: Picked = _same
    audio: bool = False
    guider: bool = False
    distilled: bool = False
    negative: bool = True
    lengths: tuple[int, int] | None = None
    unused: tuple[str, ...] = ()
    channels: int = 128
    frames_at_once: bool = True
    doubled: bool = False

    def processor(self, pipeline: Any, decoded: Any) -> Any:
        """The pipeline's own way from decoded values to pixels in [0, 1]."""
        return (_videos if self.kind == "video" else _images)(pipeline, decoded)


def _video(request: Request) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        "num_frames": request.frames,
        "num_inference_steps": request.steps,
    }
    if request.negative is not None:
        found["negative_prompt"] = request.negative
    return found


def _guided(base: Arguments, name: str = "guidance_scale") -> Arguments:
    def arguments(request: Request) -> dict[str, Any]:
        found = base(request)
        if request.guidance is not None:
            found[name] = request.guidance
        return found

    return arguments


def _image(request: Request) -> dict[str, Any]:
    found = _video(request)
    del found["num_frames"]
    return found


def _qwen(request: Request) -> dict[str, Any]:
    found = _guided(_image, "true_cfg_scale")(request)
    # without a negative prompt this pipeline ignores the scale
    if request.guidance is not None and request.guidance > 1:
        found.setdefault("negative_prompt", " ")
    return found


def _pixart(request: Request) -> dict[str, Any]:
    # binning would make another size than the one asked for, and resize
    return {**_guided(_image)(request), "use_resolution_binning": False, "clean_caption": False}


def _ltx2(request: Request) -> dict[str, Any]:
    found = {**_guided(_video)(request), "frame_rate": 24.0}
    if request.guidance is not None and request.guidance <= 1:
        # this pipeline guides in three ways, of which the scale is one; without it a step is one forward
        found |= dict.fromkeys(("audio_guidance_scale", "modality_scale", "audio_modality_scale"), 1.0)
        found |= dict.fromkeys(("stg_scale", "audio_stg_scale"), 0.0)
    return found


def _h3(request: Request) -> dict[str, Any]:
    # its scheduler counts the noise levels that steps lie between
    return {**_video(request), "num_inference_steps": request.steps + 1}


def _h3_pixels(decoded: Any) -> Any:
    """(B, 3, F, H, W) in [0, 1], of a VAE whose colours are normalised as ImageNet's."""
    mean, std = (
        decoded.new_tensor(one).float().view(1, 3, 1, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (decoded.float() * std + mean).clamp(0, 1)


def _wan_vae(vae: Settings) -> tuple[int, int, int]:
    side = int(vae.get("scale_factor_spatial", 8))
    return int(vae.get("scale_factor_temporal", 4)), side, side


def _ratios(vae: Settings) -> tuple[int, int, int] | None:
    found = vae.get("temporal_compression_ratio"), vae.get("spatial_compression_ratio")
    return None if None in found else (int(found[0]), int(found[1]), int(found[1]))  # type: ignore[arg-type]


def _factors(vae: Settings) -> tuple[int, int, int] | None:
    found = vae.get("temporal_downsample_factors"), vae.get("spatial_downsample_factors")
    return None if None in found else (prod(found[0]), prod(found[1]), prod(found[1]))  # type: ignore[arg-type]


def _halvings(name: str) -> Strides:
    """An image VAE that halves both sides between the entries of its setting `name`, or once for each."""

    def strides(vae: Settings) -> tuple[None, int, int] | None:
        if name not in vae:
            return None
        side = 2 ** (len(vae[name]) - (name == "block_out_channels"))
        return None, side, side

    return strides


FAMILIES: tuple[Family, ...] = (
    Family(
        "wan",
        ("WanPipeline",),
        "WanTransformer3DModel",
        "video",
        _guided(_video),
        _wan_vae,
        channels=96,
        frames_at_once=False,
    ),
    Family(
        "ltx2",
        ("LTX2Pipeline",),
        "LTX2VideoTransformer3DModel",
        "video",
        _ltx2,
        _ratios,
        fps=24.0,
        audio=True,
        doubled=True,
    ),
    Family(
        "hunyuan_video15",
        ("HunyuanVideo15Pipeline",),
        "HunyuanVideo15Transformer3DModel",
        "video",
        _video,
        _ratios,
        fps=24.0,
        guider=True,
    ),
    Family(
        "minimax_h3",
        ("MiniMaxH3ModularPipeline",),
        "MiniMaxH3Transformer3DModel",
        "video",
        _h3,
        _factors,
        fps=24.0,
        picked=_h3_pixels,
        audio=True,
        distilled=True,
        # 5 to 15 seconds
        lengths=(120, 360),
        unused=("transformer_ref",),
        frames_at_once=False,
    ),
    Family(
        "flux2",
        ("Flux2Pipeline", "Flux2KleinPipeline"),
        "Flux2Transformer2DModel",
        "image",
        _guided(_image),
        _halvings("block_out_channels"),
        negative=False,
    ),
    Family(
        "qwen_image",
        ("QwenImagePipeline",),
        "QwenImageTransformer2DModel",
        "image",
        _qwen,
        _halvings("temperal_downsample"),
        picked=lambda decoded: decoded[:, :, 0],
        channels=96,
    ),
    Family(
        "pixart",
        ("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
        "PixArtTransformer2DModel",
        "image",
        _pixart,
        _halvings("block_out_channels"),
        doubled=True,
    ),
)

BY_PIPELINE: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.pipelines}
