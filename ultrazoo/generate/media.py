"""Writing frames: mp4 by PyAV with a note of what made it, png for images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..weights.disk import disk_errors
from ..weights.staging import staged_file

NOTE = "comment"
"""Metadata key of the note, in mp4 and png alike."""

SUFFIXES = {"video": (".mp4",), "image": (".png",)}


def require_suffix(path: Path, kind: str) -> None:
    """Raise UsageError unless `path` ends as files of `kind` do."""
    if path.suffix.lower() not in SUFFIXES[kind]:
        raise UsageError(f"{path}: this pipeline makes {kind}s, written as {' or '.join(SUFFIXES[kind])}")


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: float,
    note: Mapping[str, Any],
    audio: tuple[np.ndarray, int] | None = None,
    force: bool = False,
) -> None:
    """Write frames (F, H, W, 3) uint8 as H.264 at `fps`, with `note` in the metadata.

    `audio`: samples (channels, n) float32 in [-1, 1] and their rate in Hz, as AAC. Raises OutputError.
    """
    import av

    tags = {"movflags": "use_metadata_tags"}
    with (
        staged_file(path, force=force) as new,
        disk_errors(path),
        av.open(str(new), "w", format="mp4", options=tags) as container,
    ):
        container.metadata[NOTE] = json.dumps(note)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        # odd sides have no halved colour planes
        even = not (frames.shape[1] % 2 or frames.shape[2] % 2)
        stream.pix_fmt = "yuv420p" if even else "yuv444p"
        stream.options = {"crf": "16"}
        sound = None
        if audio is not None:
            sound = container.add_stream("aac", rate=audio[1], layout="stereo" if len(audio[0]) == 2 else "mono")
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
        if sound is not None and audio is not None:
            samples = np.ascontiguousarray(audio[0], dtype=np.float32)
            heard = av.AudioFrame.from_ndarray(samples, format="fltp", layout=sound.layout.name)
            heard.sample_rate = audio[1]
            container.mux(sound.encode(heard))
            container.mux(sound.encode(None))


def write_image(path: Path, image: np.ndarray, note: Mapping[str, Any], force: bool = False) -> None:
    """Write one image (H, W, 3) uint8 as png with `note` in its text. Raises OutputError."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(NOTE, json.dumps(note))
    with staged_file(path, force=force) as new, disk_errors(path):
        Image.fromarray(image).save(new, format="PNG", pnginfo=info)


def read_note(path: str | Path) -> dict[str, Any]:
    """The note inside a file that `write_video` or `write_image` wrote; empty where there is none."""
    if Path(path).suffix.lower() == ".png":
        from PIL import Image

        with Image.open(path) as image:
            text = image.info.get(NOTE, "")
    else:
        import av

        with av.open(str(path)) as container:
            text = container.metadata.get(NOTE, "")
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


def pixels(frames: np.ndarray) -> np.ndarray:
    """Frames in [0, 1] as uint8."""
    found: np.ndarray = (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)
    return found
