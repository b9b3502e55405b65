"""RedNet: ResNet with 7x7 involutions instead of 3x3 convolutions ("Involution: Inverting the Inherence of Convolution
for Visual Recognition", CVPR 2021). Importing this module registers the models with timm:

    timm.create_model("rednet101", num_classes=1000)
    timm.create_model("rednet26", layers=(1, 1, 1, 1), base_width=32, stem_width=16, num_classes=10)  # for small images
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, create_classifier, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from cit_scale.models.involution import Involution2d

# Number of bottlenecks in each of the four stages.
LAYERS = {
    "rednet26": (1, 2, 4, 1),
    "rednet38": (2, 3, 5, 2),
    "rednet50": (3, 4, 6, 3),
    "rednet101": (3, 4, 23, 3),
    "rednet152": (3, 8, 36, 3),
}


def init_convolutions(network: nn.Module) -> None:
    """Initialize every convolution of the network with Kaiming-normal weights and zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class InvolutionStem(nn.Module):
    """RedNet's stem without its max pooling; also the stem of CiT's involution teacher.

    A 3x3 convolution of stride 2 to `width` channels, a 3x3 involution, a 3x3 convolution to 2 x width; BatchNorm and
    ReLU follow each.

    Forward: (B, in_chans, H, W) -> (B, num_features, ceil(H / 2), ceil(W / 2)).
    """

    stride = 2

    def __init__(self, in_chans: int = 3, width: int = 32) -> None:
        super().__init__()
        self.num_features = 2 * width
        self.conv1 = nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Involution2d(width, kernel_size=3)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, self.num_features, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.num_features)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)))


class Bottleneck(nn.Module):
    """ResNet's bottleneck with a 7x7 involution in the middle, which has the stride.

    drop_path: probability that the residual branch is left out for an image in training.

    Forward: (B, in_chans, H, W) -> (B, 4 x width, ceil(H / stride), ceil(W / stride)).
    """

    expansion = 4

    def __init__(self, in_chans: int, width: int, stride: int = 1, drop_path: float = 0.0) -> None:
        super().__init__()
        out_chans = width * self.expansion
        self.conv1 = nn.Conv2d(in_chans, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Involution2d(width, kernel_size=7, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_chans, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chans)
        self.downsample: nn.Module
        if stride > 1 or in_chans != out_chans:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_chans, out_chans, 1, stride=stride, bias=False), nn.BatchNorm2d(out_chans)
            )
        else:
            self.downsample = nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.drop_path(self.bn3(self.conv3(x))) + shortcut)


def _stage(in_chans: int, width: int, stride: int, drop_paths: Sequence[float]) -> nn.Sequential:
    """Return a bottleneck for each of ``drop_paths``, of which the first has the stride."""
    out_chans = width * Bottleneck.expansion
    first = Bottleneck(in_chans, width, stride, drop_paths[0])
    return nn.Sequential(first, *(Bottleneck(out_chans, width, drop_path=rate) for rate in drop_paths[1:]))


class RedNet(nn.Module):
    """RedNet, with the methods that timm expects of an image model.

    layers: number of bottlenecks in each of the four stages.
    base_width: width of the bottlenecks in the first stage; each further stage doubles it. The output of a stage has
    four times its width.
    stem_width: width of the stem; its output has twice as many channels. base_width and stem_width must be multiples of
    16, the number of channels that share an involution kernel.
    drop_rate: dropout before the classifier. drop_path_rate: that of the last bottleneck's residual branch; it rises
    linearly from 0 at the first.
    output_stride: of the last feature map, 32, 16 or 8: the last stages keep the size of their input. Their involutions
    are not dilated, as in the authors' code.

    Forward: (B, in_chans, H, W) -> (B, num_classes). The last feature map has 1 / output_stride of height and width.
    Raises ValueError for widths or layers that do not fit.
    """

    def __init__(
        self,
        layers: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        base_width: int = 64,
        stem_width: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers={tuple(layers)}: RedNet has four stages with at least one bottleneck each")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride}: a RedNet has 32, 16 or 8")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        widths = tuple(base_width * 2**stage for stage in range(4))
        outputs = tuple(width * Bottleneck.expansion for width in widths)
        reductions = tuple(min(reduction, output_stride) for reduction in (4, 8, 16, 32))
        strides = (1, *(after // before for before, after in itertools.pairwise(reductions)))
        rates = torch.linspace(0, drop_path_rate, sum(layers), device="cpu")
        drop_paths = [stage.tolist() for stage in rates.split(tuple(layers))]
        self.stem = InvolutionStem(in_chans, stem_width)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(self.stem.num_features, widths[0], strides[0], drop_paths[0])
        self.layer2 = _stage(outputs[0], widths[1], strides[1], drop_paths[1])
        self.layer3 = _stage(outputs[1], widths[2], strides[2], drop_paths[2])
        self.layer4 = _stage(outputs[2], widths[3], strides[3], drop_paths[3])
        # timm's features_only reads from this where to take feature maps, and their strides.
        self.feature_info = [
            {"num_chs": self.stem.num_features, "reduction": 2, "module": "stem"},
            *(
                {"num_chs": output, "reduction": reduction, "module": f"layer{stage}"}
                for stage, (output, reduction) in enumerate(zip(outputs, reductions, strict=True), 1)
            ),
        ]
        self.num_features = outputs[-1]
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights()
        self.to(device=device, dtype=dtype)

    def init_weights(self) -> None:
        """Initialize all convolutions Kaiming-normal, and each residual branch such that it returns zero."""
        init_convolutions(self)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return patterns that assign parameters to layers, part of timm's contract for models."""
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes`; 0: by an identity, which returns the pooled features.

        global_pool: timm's name of another pooling; None keeps it.
        """
        factory = get_device_dtype(self)
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type, **factory)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, (B, num_features, h, w). x: (B, in_chans, H, W)."""
        x = self.maxpool(self.stem(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last feature map and those of ``feature_info``, each (B, C, h, w); part of timm's contract.

        x: (B, in_chans, H, W). indices: which of the five; the last n for a number, all for None. norm: there is none
        to apply. stop_early: leave out the stages behind the last index. intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: a RedNet has feature maps in 'NCHW'")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        x = self.stem(x)
        maps = [x]
        x = self.maxpool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[: last if stop_early else None]:
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            maps.append(x)
        intermediates = [maps[index] for index in taken]
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages behind the last of ``indices``, and the classifier; part of timm's contract."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        for number in range(last + 1, len(self.feature_info)):
            setattr(self, f"layer{number}", nn.Sequential())  # empty, so that checkpoint_seq can go through it
        if last == 0:
            self.maxpool = nn.Identity()
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < len(self.feature_info) - 1:
            self.reset_classifier(0, "")
        return taken

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, num_classes); with pre_logits the pooled features. x: (B, num_features, h, w)."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg() -> dict[str, Any]:
    """Return timm's pretrained_cfg. There are no weights to download."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "fc",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({name: _cfg() for name in LAYERS})


def _create_rednet(name: str, pretrained: bool, **kwargs: Any) -> RedNet:
    features = {"out_indices": (0, 1, 2, 3, 4)}
    return build_model_with_cfg(RedNet, name, pretrained, feature_cfg=features, **{"layers": LAYERS[name], **kwargs})


@register_model
def rednet26(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-26: 9.2 M parameters."""
    return _create_rednet("rednet26", pretrained, **kwargs)


@register_model
def rednet38(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-38: 12.4 M parameters."""
    return _create_rednet("rednet38", pretrained, **kwargs)


@register_model
def rednet50(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-50: 15.5 M parameters."""
    return _create_rednet("rednet50", pretrained, **kwargs)


@register_model
def rednet101(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-101: 25.7 M parameters."""
    return _create_rednet("rednet101", pretrained, **kwargs)


@register_model
def rednet152(pretrained: bool = False, **kwargs: Any) -> RedNet:
    """RedNet-152: 34.0 M parameters."""
    return _create_rednet("rednet152", pretrained, **kwargs)
