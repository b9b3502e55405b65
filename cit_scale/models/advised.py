"""Gives any timm model a linear head per teacher: the way to advise a student that has no tokens for its teachers.

All heads read what the model's own classifier reads, its pooled features. A CiT has a token for each teacher instead
(cit.py), as in the paper. Importing this module registers the result with timm:

    timm.create_model("advised", trunk="mobilenetv3_small_100", teachers=("conv", "inv"), num_classes=10)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from cit_scale.batch import StudentLogits, student_logits_type
from cit_scale.models.cit import checked_teachers

ADVISED = "advised"  # the model's name in timm
PREFIX = "trunk."


class UnadvisableError(ValueError):
    """The model, or a teacher's name, allows no heads beside the model's own."""


class Advised(nn.Module):
    """A timm model with a head per teacher, beside its own.

    trunk: a timm model with ``forward_features`` and ``forward_head``, whose classifier is one linear layer.
    teachers: names of the heads.
    Forward: images (B, 3, H, W) -> the mean of all heads' logits, (B, K). `forward_heads` returns every head's.
    Raises UnadvisableError for a model of another build, and for names that no head can have.
    """

    def __init__(self, trunk: nn.Module, teachers: Sequence[str]) -> None:
        super().__init__()
        self.trunk = trunk
        self.pretrained_cfg: Mapping[str, Any] = {}
        """timm's description of the model, as it sets it for every model."""

        self._pooled: Tensor | None = None
        try:
            self.teachers = checked_teachers(teachers)
        except ValueError as error:
            raise UnadvisableError(str(error)) from error
        self.logits_type = student_logits_type(self.teachers)
        self.teacher_heads = nn.ModuleDict()
        classifier = _classifier_of(trunk)
        if classifier is None:
            raise UnadvisableError(
                f"{type(trunk).__name__} has no linear classifier on pooled features, where heads for the teachers "
                f"{', '.join(teachers)} could be; choose another model, or drop the teachers"
            )
        for name in teachers:
            head = nn.Linear(
                classifier.in_features,
                classifier.out_features,
                device=classifier.weight.device,
                dtype=classifier.weight.dtype,
            )
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.teacher_heads[name] = head
        classifier.register_forward_pre_hook(self._keep_pooled)
        self.pretrained_cfg = {**cast(Any, trunk).pretrained_cfg, **_layer_names(trunk, self.teachers)}

    def _keep_pooled(self, classifier: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._pooled = inputs[0]

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Return the heads in the order of StudentLogits."""
        classifier = _classifier_of(self.trunk)
        assert classifier is not None
        return classifier, *self.teacher_heads.values()

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay, part of timm's contract for models."""
        names: set[str] = getattr(self.trunk, "no_weight_decay", set)()
        return {f"{PREFIX}{name}" for name in names}

    @property
    def num_classes(self) -> int:
        return cast(Any, self.trunk).num_classes

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without the type of the logits, which is made at run time and has no place in a module."""
        return {name: value for name, value in self.__dict__.items() if name != "logits_type"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.logits_type = student_logits_type(self.teachers)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the trunk's blocks again in the backward pass, part of timm's contract for models."""
        cast(Any, self.trunk).set_grad_checkpointing(enable)

    @property
    def blocks(self) -> Any:
        """The trunk's blocks. AttributeError where it has none of this name, as for any attribute."""
        return self.trunk.blocks

    def forward_heads(self, images: Tensor) -> StudentLogits:
        """Return the logits of every head in any mode: StudentLogits, each (B, K)."""
        trunk = cast(Any, self.trunk)
        # What the classifier was given, (B, C), on the way to the model's own logits. Computed twice, the BatchNorms of
        # some heads would see each batch twice.
        own = trunk.forward_head(trunk.forward_features(images))
        pooled, self._pooled = self._pooled, None
        assert pooled is not None
        return self.logits_type(own, *(head(pooled) for head in self.teacher_heads.values()))

    def forward(self, images: Tensor) -> Tensor:
        logits = list(self.forward_heads(images))
        return sum(logits[1:], logits[0]) / len(logits)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: Advised) -> dict[str, Tensor]:
    """Adapt the state dict of the trunk alone, or of an advised model, by the trunk's own rules. timm's convention."""
    heads = {key: each for key, each in state_dict.items() if key.startswith("teacher_heads.")}
    trunk = {key.removeprefix(PREFIX): each for key, each in state_dict.items() if key not in heads}
    adapt = getattr(sys.modules[type(model.trunk).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        trunk = dict(adapt(trunk, model.trunk))
    return {**{f"{PREFIX}{key}": each for key, each in trunk.items()}, **heads}


def _layer_names(trunk: nn.Module, teachers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names of the classifiers and of the first convolutions, for timm's pretrained_cfg."""
    described = cast(Any, trunk).pretrained_cfg
    names: dict[str, tuple[str, ...]] = {}
    for key in ("classifier", "first_conv"):
        of_trunk = described.get(key) or ()
        names[key] = tuple(f"{PREFIX}{name}" for name in ((of_trunk,) if isinstance(of_trunk, str) else of_trunk))
    names["classifier"] += tuple(f"teacher_heads.{name}" for name in teachers)
    return names


def _build_advised(
    trunk: str, trunk_args: Mapping[str, Any] | None = None, teachers: Sequence[str] = (), **options: Any
) -> Advised:
    return Advised(timm.create_model(trunk, **{**(trunk_args or {}), **options}), teachers)


@register_model
def advised(pretrained: bool = False, **kwargs: Any) -> Advised:
    """Any timm model with a head per teacher.

    trunk, trunk_args: name and arguments of the model, as timm.create_model takes them. teachers: names of the heads.
    """
    return build_model_with_cfg(
        _build_advised, ADVISED, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
    )


def _classifier_of(model: nn.Module) -> nn.Linear | None:
    """The model's linear classifier; None for a model without one, or with several."""
    if not all(hasattr(model, name) for name in ("forward_features", "forward_head", "get_classifier")):
        return None
    classifier = cast(Any, model).get_classifier()
    return classifier if isinstance(classifier, nn.Linear) else None
