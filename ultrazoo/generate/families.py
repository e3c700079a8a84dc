"""How each family of pipelines is called: arguments, sizes, guidance, and what comes back from its decoder.

Torch-free, and no pipeline is imported: a family is known by the class name in ``model_index.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

    `picked` takes what the pipeline takes of the VAE's output. `audio`: whether an audio VAE decodes after the video's.
    `guider`: the guidance scale belongs to a guider component. `channels`: of the VAE decoder's widest full-resolution
    layer, `frames_at_once`: whether it decodes all frames together, `doubled`: whether guidance doubles the batch of one
    forward; all three for the memory estimate.
    """

    name: str
    pipelines: tuple[str, ...]
    model: str
    kind: Literal["video", "image"]
    arguments: Arguments
    fps: float = 16.0
    picked: Picked = _same
    audio: bool = False
    guider: bool = False
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
    return {**_guided(_video)(request), "frame_rate": 24.0}


def _h3(request: Request) -> dict[str, Any]:
    found = _guided(_video)(request)
    found.pop("negative_prompt", None)
    return found


FAMILIES: tuple[Family, ...] = (
    Family(
        "wan",
        ("WanPipeline",),
        "WanTransformer3DModel",
        "video",
        _guided(_video),
        channels=96,
        frames_at_once=False,
    ),
    Family(
        "ltx2", ("LTX2Pipeline",), "LTX2VideoTransformer3DModel", "video", _ltx2, fps=24.0, audio=True, doubled=True
    ),
    Family(
        "hunyuan_video15",
        ("HunyuanVideo15Pipeline",),
        "HunyuanVideo15Transformer3DModel",
        "video",
        _video,
        fps=24.0,
        guider=True,
    ),
    Family(
        "minimax_h3",
        ("MiniMaxH3ModularPipeline",),
        "MiniMaxH3Transformer3DModel",
        "video",
        _h3,
        fps=24.0,
        audio=True,
    ),
    Family("flux2", ("Flux2Pipeline", "Flux2KleinPipeline"), "Flux2Transformer2DModel", "image", _guided(_image)),
    Family(
        "qwen_image",
        ("QwenImagePipeline",),
        "QwenImageTransformer2DModel",
        "image",
        _qwen,
        picked=lambda decoded: decoded[:, :, 0],
        channels=96,
    ),
    Family(
        "pixart",
        ("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
        "PixArtTransformer2DModel",
        "image",
        _pixart,
        doubled=True,
    ),
)

BY_PIPELINE: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.pipelines}
