"""CiT, the student of "Co-advise: Cross Inductive Bias Distillation" (CVPR 2022), built on timm's VisionTransformer.

Importing this module registers the models with timm:

    timm.create_model("cit_small_patch16_224")                                    # aligned, teachers conv and inv
    timm.create_model("cit_tiny_patch16_224", teachers=("conv",), aligned=False)  # one learned token, as in DeiT
    timm.create_model("cit_tiny_patch16_224", teachers=("conv", "swin"), stems={"swin": "patch"})

The student has one token and one head per teacher. The sequence is the class token, the teachers' tokens in the order
of `teachers`, and the patches.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchDropout, get_device_dtype, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from cit_scale.batch import StudentLogits, student_logits_type
from cit_scale.models.rednet import InvolutionStem, init_convolutions

SIZES = {
    "cit_tiny_patch16_224": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "cit_small_patch16_224": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "cit_base_patch16_224": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

# Options of timm's VisionTransformer that would change the number or the order of the tokens: CiT works with these
# values only.
FIXED_OPTIONS = {
    "class_token": True,
    "global_pool": "token",
    "pos_embed": "learn",
    "no_embed_class": False,
    "reg_tokens": 0,
    "dynamic_img_size": False,
}


class ConvStem(nn.Module):
    """The stem with the convolution teacher's inductive bias: a 7x7 convolution of stride 2 and two 3x3 convolutions.

    All have `width` channels, and BatchNorm and ReLU follow each.
    Forward: (B, in_chans, H, W) -> (B, num_features, ceil(H / 2), ceil(W / 2)).
    """

    stride = 2

    def __init__(self, in_chans: int = 3, width: int = 64) -> None:
        super().__init__()
        self.num_features = width
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)))


class PatchStem(nn.Identity):
    """The identity, for transformer teachers: the projection reads pixels, as in a plain ViT.

    Forward: (B, in_chans, H, W) -> the same.
    """

    stride = 1

    def __init__(self, in_chans: int = 3) -> None:
        super().__init__()
        self.num_features = in_chans


# Kind of stem -> module. A teacher with the name of a kind gets that stem; see CiT's argument `stems`.
STEMS = {
    "conv": ConvStem,
    "inv": InvolutionStem,
    "patch": PatchStem,
}


class AlignedEmbed(nn.Module):
    """Token alignment: for each teacher a stem with its inductive bias and a projection of the stem's features.

    The patch tokens are the sum of all projections. A teacher's token is the mean of its own projection over all
    positions.

    Replaces timm's PatchEmbed, so its attributes and methods are those that VisionTransformer uses of a PatchEmbed.

    stems: teacher -> kind of stem, a key of STEMS; not empty.
    Forward: (B, in_chans, H, W) -> (B, T + N, embed_dim), the T teachers' tokens in front of the N patches.
    Raises ValueError for an image size or a patch size that does not fit.
    """

    strict_img_size = True

    def __init__(
        self,
        stems: Mapping[str, str],
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dynamic_img_pad:
            raise ValueError("dynamic_img_pad=True: an aligned CiT has no padding; choose img_size to fit the patches")
        self.patch_size = to_2tuple(patch_size)
        self.set_input_size(img_size)
        self.stems = nn.ModuleDict()
        self.projections = nn.ModuleDict()
        for name, kind in stems.items():
            stem = STEMS[kind](in_chans)
            if any(size % stem.stride for size in self.patch_size):
                raise ValueError(
                    f"patch_size={self.patch_size} is not a multiple of {stem.stride}, the stride of {name!r}'s stem"
                )
            # The stem has already reduced the image by its stride, so a patch has fewer positions than pixels.
            kernel = tuple(size // stem.stride for size in self.patch_size)
            self.stems[name] = stem
            self.projections[name] = nn.Conv2d(stem.num_features, embed_dim, kernel, stride=kernel, bias=bias)
        self.init_weights()
        self.to(device=device, dtype=dtype)

    def init_weights(self) -> None:
        """Initialize all convolutions Kaiming-normal."""
        init_convolutions(self)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Set the image size for all further calls. Raises ValueError for another patch size, which is fixed."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"patch_size={patch_size}: the stems were built for patches of {self.patch_size}")
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
            _check_image_fits_patches(self.img_size, self.patch_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self) -> int:
        """Return the number of pixels per patch, along the longer side."""
        return max(self.patch_size)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the number of rows and columns of patches in an image of this size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, images: Tensor) -> Tensor:
        # An assertion of torch's and no "if": torch.fx and torch.jit take it along.
        height, width = images.shape[2], images.shape[3]
        torch._assert(height == self.img_size[0], f"images of height {height}, but the model takes {self.img_size[0]}")
        torch._assert(width == self.img_size[1], f"images of width {width}, but the model takes {self.img_size[1]}")
        tokens: list[Tensor] = []  # each (B, 1, C)
        patches: list[Tensor] = []  # each (B, N, C), N = h * w
        for stem, projection in zip(self.stems.values(), self.projections.values()):  # noqa: B905  torch.jit has no strict
            patch = projection(stem(images)).flatten(2).transpose(1, 2)
            tokens.append(patch.mean(1, keepdim=True))
            patches.append(patch)
        total = patches[0]
        for patch in patches[1:]:
            total = total + patch
        return torch.cat(tokens + [total], dim=1)  # noqa: RUF005  torch.jit cannot unpack


class CiT(VisionTransformer):
    """A vision transformer with a token and a head for each teacher.

    teachers: names, in the order of the tokens. They become fields of StudentLogits, so they must be identifiers. An
    empty sequence gives a plain ViT.
    aligned: whether the teachers' tokens and the patches come from stems with the teachers' inductive biases
    (AlignedEmbed). Otherwise, and without teachers, timm's patch embedding and learned tokens, as in DeiT.
    stems: teacher -> kind of stem (a key of STEMS), for the teachers of an aligned model that are not named after a
    kind. A teacher without a stem raises ValueError instead of getting a learned token: a misspelt name would otherwise
    train an unaligned model without a warning.
    vit: arguments of timm's VisionTransformer. img_size must be a multiple of patch_size; with a stem of stride 2,
    patch_size must be even.

    Forward: images (B, in_chans, H, W) -> the mean of all heads, (B, num_classes); in training mode, after
    set_distilled_training(True), StudentLogits(cls, *teachers), each (B, num_classes). This is timm's contract for
    distilled models. AssertionError for images of another size. `forward_heads` returns every head in any mode.
    Loading a state dict of another image size resamples its position embedding.
    Raises ValueError for teachers, stems and sizes that do not fit.
    """

    def __init__(
        self,
        teachers: Sequence[str] = ("conv", "inv"),
        aligned: bool = True,
        stems: Mapping[str, str] | None = None,
        weight_init: Literal["skip", "reset", "jax", "jax_nlhb", "moco", ""] = "",
        **vit: Any,
    ) -> None:
        teachers = checked_teachers(teachers)
        _check_vit_options(**vit)
        if aligned and teachers:
            vit["embed_layer"] = partial(AlignedEmbed, _stem_kinds(teachers, stems or {}))
        # Weights are initialized at the end, when the teachers' tokens and heads exist, too.
        super().__init__(weight_init="skip", **vit)

        factory = get_device_dtype(self)
        self.teachers = teachers
        self.logits_type = student_logits_type(teachers)
        self.distilled_training = False
        # timm has counted the class token only: make the prefix, the position embedding and the patch dropout count the
        # teachers' tokens, too.
        self.num_prefix_tokens = 1 + len(teachers)
        num_tokens = self.num_prefix_tokens + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, self.embed_dim, **factory))
        if isinstance(self.patch_drop, PatchDropout):
            self.patch_drop.num_prefix_tokens = self.num_prefix_tokens
        self.teacher_tokens: nn.Parameter | None
        if teachers and not aligned:
            self.teacher_tokens = nn.Parameter(torch.empty(1, len(teachers), self.embed_dim, **factory))
        else:
            self.teacher_tokens = None
        self.teacher_heads = nn.ModuleDict()
        self.reset_classifier(self.num_classes)
        self.register_load_state_dict_pre_hook(_resample_pos_embed)

        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialize as timm does for a ViT; learned teacher tokens are initialized like the position embedding."""
        super().init_weights(mode, needs_reset)
        if self.teacher_tokens is not None:
            trunc_normal_(self.teacher_tokens, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay, part of timm's contract for models."""
        learned = {"cls_token", "pos_embed"}
        return learned if self.teacher_tokens is None else {*learned, "teacher_tokens"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that assign parameters to layers, part of timm's contract for models."""
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed|teacher_tokens)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without the type of the logits, which is made at run time and has no place in a module."""
        return {name: value for name, value in self.__dict__.items() if name != "logits_type"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.logits_type = student_logits_type(self.teachers)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Make training mode return the logits of every head or, with False (the default), their mean."""
        self.distilled_training = enable

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Return the heads in the order of StudentLogits."""
        return self.head, *self.teacher_heads.values()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace all heads by new ones for `num_classes`; 0: by identities, which return the tokens.

        Raises ValueError for a `global_pool` other than "token".
        """
        if global_pool not in (None, "", "token"):
            raise ValueError(f"global_pool={global_pool!r}: each head of CiT reads its own token; use 'token' or None")
        super().reset_classifier(num_classes)
        factory = get_device_dtype(self)
        for name in self.teachers:
            head = nn.Linear(self.embed_dim, num_classes, **factory) if num_classes > 0 else nn.Identity()
            self.teacher_heads[name] = head.train(self.training)  # new modules start in training mode

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Put the class token, learned teachers' tokens and the patches in a row, and add the positions.

        AlignedEmbed has put the teachers' tokens before the patches already. It does not call timm's own,
        because torch.jit does not support super(). FIXED_OPTIONS rule out timm's other options.
        """
        assert self.cls_token is not None
        assert self.pos_embed is not None
        tokens = [self.cls_token.expand(x.shape[0], -1, -1)]
        if self.teacher_tokens is not None:
            tokens.append(self.teacher_tokens.expand(x.shape[0], -1, -1))
        tokens.append(x)
        return self.pos_drop(torch.cat(tokens, dim=1) + self.pos_embed)

    def _head_logits(self, features: Tensor) -> list[Tensor]:
        """Return the logits of every head. features: (B, 1 + T + N, C), after the last LayerNorm."""
        tokens = self.head_drop(features[:, : self.num_prefix_tokens])
        logits = [self.head(tokens[:, 0])]
        for index, head in enumerate(self.teacher_heads.values()):
            logits.append(head(tokens[:, 1 + index]))
        return logits

    def forward_heads(self, images: Tensor) -> StudentLogits:
        """Return the logits of every head in training and in evaluation mode: StudentLogits, each (B, num_classes)."""
        return self.logits_type(*self._head_logits(self.forward_features(images)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits, as described for the class. x: (B, 1 + T + N, C) from forward_features.

        pre_logits: return the mean of the heads' tokens instead, (B, C).
        """
        if pre_logits:
            return self.head_drop(x[:, : self.num_prefix_tokens]).mean(1)
        logits = self._head_logits(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return cast(Any, self.logits_type(*logits))  # no Tensor in this mode: timm's contract
        return torch.stack(logits).mean(0)


def _check_vit_options(
    img_size: int | tuple[int, int] = 224,
    patch_size: int | tuple[int, int] = 16,
    embed_dim: int = 768,
    num_heads: int = 12,
    **options: Any,
) -> None:
    """Raise ValueError for arguments of VisionTransformer that CiT does not support. Defaults are timm's."""
    for option, value in FIXED_OPTIONS.items():
        if options.get(option, value) != value:
            raise ValueError(f"{option}={options[option]!r} would change the tokens of a CiT; use {value!r}")
    _check_image_fits_patches(to_2tuple(img_size), to_2tuple(patch_size))
    if embed_dim % num_heads:
        fits = -(-embed_dim // num_heads) * num_heads
        raise ValueError(f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}; {fits} is")


def _check_image_fits_patches(img_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Raise ValueError unless the image is a whole number of patches high and wide."""
    if any(pixels % patch for pixels, patch in zip(img_size, patch_size, strict=True)):
        fits = tuple(max(pixels // patch, 1) * patch for pixels, patch in zip(img_size, patch_size, strict=True))
        raise ValueError(f"img_size={img_size} is not a multiple of patch_size={patch_size}; {fits} is")


def checked_teachers(teachers: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple. Raises ValueError for names that are taken, repeated, or not identifiers."""
    if isinstance(teachers, str):
        raise ValueError(f"teachers={teachers!r} is a string; give a sequence of names, such as ({teachers!r},)")
    teachers = tuple(teachers)
    for name in teachers:
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise ValueError(
                f"teacher {name!r} becomes a field of StudentLogits; name it by an identifier, such as 'conv_2'"
            )
        # Names that the trainer has for other heads and terms, and attributes of ModuleDict, which holds the heads.
        if name in ("cls", "average", "label") or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"teacher {name!r} needs another name: this one is taken by the trainer or by torch")
    if len(set(teachers)) < len(teachers):
        raise ValueError(f"teachers={teachers}: each name may occur only once; drop or rename the repeated ones")
    return teachers


def _stem_kinds(teachers: tuple[str, ...], stems: Mapping[str, str]) -> dict[str, str]:
    """Return the kind of stem of each teacher: the given one, otherwise the one with the teacher's name.

    Raises ValueError for a kind that STEMS does not have, and for stems of unknown teachers.
    """
    strangers = [name for name in stems if name not in teachers]
    if strangers:
        raise ValueError(f"stems are given for {strangers}, which are not among the teachers {list(teachers)}")
    kinds = {name: stems.get(name, name) for name in teachers}
    for name, kind in kinds.items():
        if kind not in STEMS:
            raise ValueError(
                f"teacher {name!r} of an aligned model has no stem {kind!r}; known: {', '.join(STEMS)}. "
                f"Say which with stems={{{name!r}: 'conv'}}, or use learned tokens with aligned=False"
            )
    return kinds


def _resample_pos_embed(model: CiT, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Resample a position embedding of another square grid to this model's grid. A hook of load_state_dict.

    An embedding of any other length, as from a model with another number of teachers, is left unchanged, and
    load_state_dict refuses it.
    """
    key = f"{prefix}pos_embed"
    if key not in state_dict:
        return
    prefix_tokens, grid_size = model.num_prefix_tokens, model.patch_embed.grid_size
    num_patches = state_dict[key].shape[1] - prefix_tokens
    is_square = num_patches > 0 and math.isqrt(num_patches) ** 2 == num_patches
    if is_square and num_patches != model.patch_embed.num_patches:
        state_dict[key] = resample_abs_pos_embed(state_dict[key], grid_size, num_prefix_tokens=prefix_tokens)


def _layer_names(
    teachers: Sequence[str] = ("conv", "inv"),
    aligned: bool = True,
    stems: Mapping[str, str] | None = None,
    **_: Any,
) -> dict[str, tuple[str, ...]]:
    """Return the names of the classifiers and of the first convolutions, for timm's pretrained_cfg."""
    first: tuple[str, ...] = ("patch_embed.proj",)
    if aligned and teachers:
        kinds = {name: (stems or {}).get(name, name) for name in teachers}
        first = tuple(
            f"patch_embed.projections.{name}" if kind == "patch" else f"patch_embed.stems.{name}.conv1"
            for name, kind in kinds.items()
        )
    return {"classifier": ("head", *(f"teacher_heads.{name}" for name in teachers)), "first_conv": first}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: CiT) -> dict[str, Tensor]:
    """Adapt the state dict of a ViT, a DeiT with or without distillation, or a CiT with other teachers, to a CiT.

    timm's convention: loaders pass every state dict through it. The position embedding is resampled to the model's
    grid. The tokens, positions and heads of teachers that both networks have are kept. The others start from those of
    DeiT's distillation token, or, for positions, from that of the class token. Whatever else does not fit is left as it
    is, for the caller to drop or to refuse.
    """
    adapted = dict(state_dict)
    names = _teachers_of(state_dict, model)
    if "dist_token" in state_dict:
        adapted.setdefault("teacher_tokens", state_dict["dist_token"])
    for part in ("weight", "bias"):
        if f"head_dist.{part}" in state_dict:
            for name in model.teachers:
                adapted.setdefault(f"teacher_heads.{name}.{part}", state_dict[f"head_dist.{part}"])
    if "teacher_tokens" in adapted and model.teacher_tokens is not None and names:
        rows = [min(names.index(name) if name in names else 0, len(names) - 1) for name in model.teachers]
        adapted["teacher_tokens"] = adapted["teacher_tokens"][:, rows]
    if "pos_embed" in state_dict:
        adapted["pos_embed"] = _adapt_positions(state_dict["pos_embed"], names, model)
    return adapted


def _teachers_of(state_dict: Mapping[str, Tensor], model: CiT) -> list[str]:
    """Return the names of the tokens beside the class token, in their order in ``state_dict``.

    A safetensors file does not keep the order of its teachers. Of several it is known only where they are those of the
    model; otherwise none gets a name that the model has.
    """
    theirs = {key.split(".")[1] for key in state_dict if key.startswith("teacher_heads.")}
    if len(theirs) > 1:
        return (
            list(model.teachers) if theirs == set(model.teachers) else [f"({number})" for number in range(len(theirs))]
        )
    return list(theirs) or (["dist"] if "dist_token" in state_dict else [])


def _adapt_positions(positions: Tensor, names: Sequence[str], model: CiT) -> Tensor:
    """Return a position embedding for the model's tokens and grid, or ``positions`` if it has no square grid.

    positions: (1, P + N, C). names: of the tokens that it may have beside the class token.
    """
    counts = (1 + len(names), model.num_prefix_tokens, 1, 0)
    grids = [(count, positions.shape[1] - count) for count in counts]
    found = [count for count, patches in grids if patches > 0 and math.isqrt(patches) ** 2 == patches]
    if not found:
        return positions
    prefix, patches = positions[:, : found[0]], positions[:, found[0] :]
    if found[0] == 0:
        return positions
    known = ["cls", *names][: found[0]]
    fallback = known.index("dist") if "dist" in known else 0
    rows = [0, *(known.index(name) if name in known else fallback for name in model.teachers)]
    moved = torch.cat([prefix[:, rows], patches], dim=1)
    if patches.shape[1] == model.patch_embed.num_patches:
        return moved
    return resample_abs_pos_embed(moved, model.patch_embed.grid_size, num_prefix_tokens=len(rows))


def _cfg() -> dict[str, Any]:
    """Return timm's pretrained_cfg of a CiT with the default teachers. There are no weights to download."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        **_layer_names(),
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({name: _cfg() for name in SIZES})


def _create_cit(name: str, pretrained: bool, **kwargs: Any) -> CiT:
    # timm replaces classifiers and first convolutions by these names, so they are those of this model's teachers.
    overlay = _layer_names(**kwargs) | dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    return build_model_with_cfg(
        CiT,
        name,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        pretrained_cfg_overlay=overlay,
        **{**SIZES[name], **kwargs},
    )


@register_model
def cit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> CiT:
    """CiT-Ti: 7.6 M parameters with two aligned teachers."""
    return _create_cit("cit_tiny_patch16_224", pretrained, **kwargs)


@register_model
def cit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> CiT:
    """CiT-S: 25.8 M parameters with two aligned teachers."""
    return _create_cit("cit_small_patch16_224", pretrained, **kwargs)


@register_model
def cit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> CiT:
    """CiT-B: 93.9 M parameters with two aligned teachers."""
    return _create_cit("cit_base_patch16_224", pretrained, **kwargs)
