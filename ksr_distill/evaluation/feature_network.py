"""VGG16 and AlexNet in plain PyTorch, under torchvision's names: for LPIPS, KID and FID.

torchvision itself breaks torchmetrics, Lightning and diffusers beside a CPU build of PyTorch, so
the project never imports it. Its weight files (vgg16-397923af.pth, alexnet-owt-7be5be79.pth) fit.
"""

import pickle
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

Backbone = Literal["vgg", "alex"]

# ImageNet's mean and std as LPIPS applies them to images in [-1, 1] (arXiv:1801.03924's code).
INPUT_SHIFT = (-0.030, -0.088, -0.188)
INPUT_SCALE = (0.458, 0.448, 0.450)

# Width of each 3x3 convolution, M for a 2x2 max pool (arXiv:1409.1556, table 1, configuration D).
_VGG16_LAYERS = (
    *(64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
)


class _Trunk(NamedTuple):
    layers: nn.Sequential
    taps: tuple[int, ...]
    """Index of the ReLU after which each level's features are read (LPIPS, appendix)."""


class FeatureNetwork(nn.Module):
    """The convolutional trunk of VGG16 or AlexNet; frozen.

    Args:
        backbone: `vgg` (five levels of 64 to 512 channels) or `alex` (five of 64 to 384).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone: Backbone = backbone
        trunk = _vgg16() if backbone == "vgg" else _alexnet()
        self.features: nn.Sequential = trunk.layers
        self.taps = trunk.taps
        self.num_features = 512 if backbone == "vgg" else 256
        self.register_buffer("shift", torch.tensor(INPUT_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(INPUT_SCALE).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def levels(self, images: Float[Tensor, "b 3 H W"]) -> list[Float[Tensor, "b _c _h _w"]]:
        """Return the features after the last ReLU of each of the five levels."""
        x = (images - self.shift) / self.scale
        levels = []
        for index, layer in enumerate(list(self.features)[: self.taps[-1] + 1]):
            x = layer(x)
            if index in self.taps:
                levels.append(x)
        return levels

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c"]:
        """Return one vector per image: the last level, averaged over positions."""
        return self.levels(images)[-1].mean(dim=(2, 3))


def load_feature_network(weights: Path, *, key: str) -> FeatureNetwork:
    """Return the network whose weights the file holds; VGG16 or AlexNet, recognised by its keys.

    Args:
        key: The config key of the path, for the message.

    Raises:
        ValueError: If the file is missing or holds neither.
    """
    if not weights.is_file():
        raise ValueError(
            f"{key}={weights} is no file; give torchvision's vgg16-397923af.pth or "
            "alexnet-owt-7be5be79.pth"
        )
    try:
        state = (
            load_file(weights)
            if weights.suffix == ".safetensors"
            else torch.load(weights, map_location="cpu", weights_only=True)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        raise ValueError(
            f"{key}={weights} cannot be read as weights ({type(error).__name__}); "
            "give torchvision's file"
        ) from error
    trunk = {name: value for name, value in state.items() if name.startswith("features.")}
    backbone: Backbone = "vgg" if "features.28.weight" in trunk else "alex"
    network = FeatureNetwork(backbone)
    theirs, ours = ({k: v.shape for k, v in d.items()} for d in (trunk, network.state_dict()))
    if theirs != ours:
        differing = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
        raise ValueError(
            f"{key}={weights} is neither torchvision's VGG16 nor its AlexNet: "
            f"{len(differing)} of its keys or shapes differ, the first is {differing[0]}"
        )
    network.load_state_dict(trunk)
    return network


def _vgg16() -> _Trunk:
    layers: list[nn.Module] = []
    channels = 3
    for width in _VGG16_LAYERS:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
    return _Trunk(nn.Sequential(*layers), taps=(3, 8, 15, 22, 29))


def _alexnet() -> _Trunk:
    layers = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )
    return _Trunk(layers, taps=(1, 4, 7, 9, 11))
