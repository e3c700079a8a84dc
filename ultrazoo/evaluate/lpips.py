"""LPIPS (Zhang et al., arXiv:1801.03924) with a backbone from a local file.

Features of each stage are scaled to unit length over channels; their squared difference is weighted per channel, averaged over
positions, and summed over stages. Backbones: the convolutions of AlexNet or of VGG16 in torchvision's numbering, at any width;
which of the two it is shows in the keys. Where the file has no weights of the stages and the backbone has its published
widths, those that torchmetrics ships are taken.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import WeightsError, listed
from ..weights import pickled

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-8


@dataclass(frozen=True)
class Backbone:
    """A stack of convolutions: their numbers by stage, the first one's stride and padding, and the pooling between stages."""

    name: str
    stages: tuple[tuple[int, ...], ...]
    pooled: tuple[int, ...]
    """Stages before which there is a maximum over `window` with stride 2."""
    window: int
    widths: tuple[int, ...]
    """Published channels of each stage."""
    stride: int = 1
    padding: int | None = None
    """Of the first convolution; None keeps the size, as all others do."""


ALEX = Backbone("alex", ((0,), (3,), (6,), (8,), (10,)), (1, 2), 3, (64, 192, 384, 256, 256), stride=4, padding=2)
VGG = Backbone(
    "vgg",
    ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
    (1, 2, 3, 4),
    2,
    (64, 128, 256, 512, 512),
)


class Lpips(nn.Module):
    """Distance of two batches of frames; see the module's docstring. Built from `tensors` by `from_tensors`."""

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone, convolutions: Mapping[int, tuple[Tensor, Tensor]], weights: list[Tensor]):
        super().__init__()
        self.backbone = backbone
        for number, (kernel, bias) in convolutions.items():
            self.register_buffer(f"kernel{number}", kernel.float())
            self.register_buffer(f"bias{number}", bias.float())
        for stage, weight in enumerate(weights):
            self.register_buffer(f"weight{stage}", weight.float().reshape(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], twice → (B,)."""
        total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
        for stage, (x, y) in enumerate(zip(self.features(a), self.features(b), strict=True)):
            difference = (_unit(x) - _unit(y)).square() * getattr(self, f"weight{stage}")
            total = total + difference.sum(1).double().mean((1, 2))
        return total

    def features(self, x: Tensor) -> list[Tensor]:
        """Activations at the end of each stage."""
        x = (x - self.shift) / self.scale
        found = []
        for stage, numbers in enumerate(self.backbone.stages):
            if stage in self.backbone.pooled:
                x = F.max_pool2d(x, self.backbone.window, stride=2)
            for number in numbers:
                kernel = getattr(self, f"kernel{number}")
                first = number == 0
                padding = (
                    self.backbone.padding if first and self.backbone.padding is not None else kernel.shape[-1] // 2
                )
                stride = self.backbone.stride if first else 1
                x = F.relu(F.conv2d(x, kernel, getattr(self, f"bias{number}"), stride=stride, padding=padding))
            found.append(x)
        return found


def _unit(x: Tensor) -> Tensor:
    return x / (EPS + x.square().sum(1, keepdim=True)).sqrt()


_CONVOLUTION = re.compile(r"(?:features|net\.slice\d+)\.(\d+)\.(weight|bias)")
_STAGE = re.compile(r"(?:lin|lins\.)(\d+)\.(?:model\.)?\d+\.weight")
_UNUSED = re.compile(r"(?:classifier|scaling_layer)\.")


def from_tensors(tensors: Mapping[str, Tensor], where: Path) -> Lpips:
    """Build the network from a state dict: torchvision's AlexNet or VGG16, or one of the lpips package.

    Heads for classification are passed over, everything else must fit. Raises WeightsError that names `where`.
    """
    parts: dict[int, dict[str, Tensor]] = {}
    weights: dict[int, Tensor] = {}
    unexpected = []
    for key, tensor in tensors.items():
        if found := _CONVOLUTION.fullmatch(key):
            parts.setdefault(int(found[1]), {})[found[2]] = tensor
        elif found := _STAGE.fullmatch(key):
            # the lpips package stores each of these under two names
            weights[int(found[1])] = tensor
        elif not _UNUSED.match(key):
            unexpected.append(key)
    backbone = next((one for one in (ALEX, VGG) if set(parts) == {n for stage in one.stages for n in stage}), None)
    if unexpected or backbone is None:
        got = listed(map(repr, unexpected[:4])) if unexpected else f"convolutions {listed(map(str, sorted(parts)))}"
        raise WeightsError(
            f"{where} is no LPIPS network: it holds {got or 'no convolutions'}; allowed are features.N.weight and .bias of "
            "torchvision's AlexNet (0, 3, 6, 8, 10) or VGG16, with or without the lin weights of the lpips package"
        )
    widths = _chain(backbone, parts, where)
    stages = _stages(backbone, widths, weights, where)
    return Lpips(backbone, {number: (part["weight"], part["bias"]) for number, part in parts.items()}, stages)


def _chain(backbone: Backbone, parts: Mapping[int, Mapping[str, Tensor]], where: Path) -> list[int]:
    """Channels at the end of each stage; raises WeightsError when one convolution does not follow from the last."""
    channels, widths = 3, []
    for stage in backbone.stages:
        for number in stage:
            kernel, bias = parts[number].get("weight"), parts[number].get("bias")
            if kernel is None or bias is None:
                raise WeightsError(f"{where}: convolution {number} has a weight or a bias, and needs both")
            square = kernel.ndim == 4 and kernel.shape[2] == kernel.shape[3] and kernel.shape[2] % 2 == 1
            if not square or kernel.shape[1] != channels or bias.shape != kernel.shape[:1]:
                raise WeightsError(
                    f"{where}: convolution {number} has shapes {tuple(kernel.shape)} and {tuple(bias.shape)}; "
                    f"{channels} channels come in, kernels are square and odd"
                )
            channels = kernel.shape[0]
        widths.append(channels)
    return widths


def _stages(backbone: Backbone, widths: list[int], given: Mapping[int, Tensor], where: Path) -> list[Tensor]:
    if not given:
        if tuple(widths) != backbone.widths:
            raise WeightsError(
                f"{where} has no weights of the stages (lin0 … lin{len(widths) - 1}), and its widths {widths} are not "
                f"those of {backbone.name}, {list(backbone.widths)}, for which there are published ones"
            )
        given = _published(backbone.name)
    shapes = {stage: math.prod(tensor.shape) for stage, tensor in given.items()}
    if shapes != dict(enumerate(widths)):
        raise WeightsError(
            f"{where}: weights of the stages have sizes {shapes}, the stages have {dict(enumerate(widths))}"
        )
    return [given[stage] for stage in range(len(widths))]


def _published(name: str) -> dict[int, Tensor]:
    """The weights of the stages that torchmetrics ships."""
    spec = importlib.util.find_spec("torchmetrics")
    roots: list[Any] = list(spec.submodule_search_locations or ()) if spec is not None else []
    file = next(
        (f for root in roots if (f := Path(root, "functional/image/lpips_models", f"{name}.pth")).is_file()), None
    )
    if file is None:
        raise WeightsError(
            f"the published weights of LPIPS's stages for {name} come with torchmetrics, which is not installed or has none: "
            "pip install 'ultrazoo[evaluate]', or give a file that holds lin0.model.1.weight and so on"
        )
    found = {match[1]: tensor for key, tensor in pickled.read(file).items() if (match := _STAGE.fullmatch(key))}
    return {int(stage): tensor for stage, tensor in found.items()}
