"""Reading a video file one frame at a time with PyAV, and telling a damaged file from a short one.

FFmpeg hides damage where it can: it repeats lost blocks and stops quietly at the end of a file that was cut short. A measure
of such frames would be wrong without a word, so decoding errors are not concealed here, and what was read is held against
what the file's header promises.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError

STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}
# a playlist may name other files and servers; a measurement reads the one file that it was given. Formats of sound alone are
# read as well, to say what they are.
FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,nut,ivf,h264,hevc,av1,obu,yuv4mpegpipe,gif,apng,png_pipe,jpeg_pipe,"
    "wav,mp3,flac,aac"
)
LOCAL = {"protocol_whitelist": "file", "format_whitelist": FORMATS}


@dataclass(frozen=True)
class Facts:
    """What the header of a video says. `frames` is None where it does not say, `fps` as well."""

    path: Path
    width: int
    height: int
    frames: int | None
    fps: float | None
    codec: str

    def size(self) -> str:
        return f"{self.width}x{self.height}"


def probe(path: str | os.PathLike[str]) -> Facts:
    """Read the header of a video. Raises UsageError for a file that is absent, unreadable or has no picture in it."""
    with _opened(Path(path)) as container:
        return _facts(Path(path), container)


def frames(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Iterator[Tensor]:
    """The frames in the order in which they are shown: uint8 (3, H, W), RGB, one in memory at a time.

    Raises UsageError for a file that is damaged, cut short, or changes its size on the way.
    """
    from av.error import FFmpegError

    place = Path(path)
    with _opened(place) as container:
        facts = _facts(place, container)
        stream = _picture(place, container)
        stream.thread_type = "AUTO"
        stream.codec_context.options = STRICT
        read = Progress()
        try:
            for frame in _decoded(place, container, stream, read):
                if (frame.width, frame.height) != (facts.width, facts.height):
                    raise UsageError(
                        f"{place} changes its size: frame {read.frames} is {frame.width}x{frame.height}, "
                        f"the header says {facts.size()}; re-encode it at one size"
                    )
                yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).contiguous().to(device)
                read.frames += 1
        except FFmpegError as error:
            raise UsageError(
                f"{place} is damaged or cut short: frame {read.frames} cannot be decoded ({_said(error)})"
            ) from error
        _whole(place, container, facts, read)


def together(video: Path, reference: Path, device: str | torch.device = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """Frames of two videos side by side. Raises UsageError when one ends before the other."""
    first, second = frames(video, device), frames(reference, device)
    for count in itertools.count():
        a, b = next(first, None), next(second, None)
        if a is None and b is None:
            return
        if a is None or b is None:
            left = count + 1 + sum(1 for _ in (second if a is None else first))
            counts = (count, left) if a is None else (left, count)
            raise UsageError(
                f"{video} has {counts[0]} frames, its reference {reference} has {counts[1]}; both must have as many"
            )
        yield a, b


@dataclass
class Progress:
    """What was read so far: frames given out, packets of the stream, and the last moment that a packet covers (s)."""

    frames: int = 0
    packets: int = 0
    end_s: float = 0.0


def _decoded(path: Path, container: Any, stream: Any, read: Progress) -> Iterator[Any]:
    for packet in container.demux(stream):
        if packet.size:
            read.packets += 1
            if packet.pts is not None and packet.time_base:
                read.end_s = max(read.end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.is_corrupt:
                raise UsageError(f"{path} is damaged: packet {read.packets} is marked as corrupt")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise UsageError(f"{path} is damaged: frame {read.frames} was put together from what was left")
            yield frame


def _opened(path: Path) -> Any:
    import av
    from av.error import FFmpegError

    if not path.is_file():
        kind = "a directory" if path.is_dir() else "no such file"
        raise UsageError(f"{path}: {kind}; videos are read from local files only")
    try:
        return av.open(str(path.resolve()), options=LOCAL)
    except FFmpegError as error:
        raise UsageError(
            f"{path} cannot be read as a video ({_said(error)}); it may be damaged or cut short"
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


def _picture(path: Path, container: Any) -> Any:
    """The first stream of video; the cover picture of a piece of music is none."""
    from av.stream import Disposition

    moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not moving:
        others = sorted({stream.type for stream in container.streams if stream.type != "video"})
        raise UsageError(f"{path} has no video in it, only {' and '.join(others) or 'a still picture'}")
    return moving[0]


def _facts(path: Path, container: Any) -> Facts:
    stream = _picture(path, container)
    codec = stream.codec_context
    if codec is None or not codec.width or not codec.height:
        raise UsageError(f"{path} says no size of its video: it is damaged, or its codec is not known to this PyAV")
    rate = stream.average_rate
    return Facts(path, codec.width, codec.height, stream.frames or None, float(rate) if rate else None, codec.name)


def _whole(path: Path, container: Any, facts: Facts, read: Progress) -> None:
    """Raise UsageError when less was read than the header promises."""
    if not read.frames:
        raise UsageError(f"{path} holds no frame that can be decoded")
    # packets, not frames: an edit list may rightly hide frames that are in the file
    if facts.frames is not None and read.packets < facts.frames:
        raise UsageError(f"{path} is cut short: its header promises {facts.frames} frames, {read.packets} are there")
    # Matroska has no count but a duration; other formats estimate theirs from the file's size
    if "matroska" in container.format.name and len(container.streams) == 1 and container.duration:
        promised_s = container.duration / 1e6
        # times are rounded to milliseconds; the last frame may have no duration of its own
        slack_s = 0.75 / facts.fps if facts.fps else 0.5
        if read.end_s < promised_s - slack_s:
            raise UsageError(
                f"{path} is cut short: its header promises {promised_s:.2f} s, {read.end_s:.2f} s of video are there"
            )


def _said(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return str(text).splitlines()[0] if text else type(error).__name__
