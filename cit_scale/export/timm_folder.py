"""A folder that timm opens by ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from cit_scale.datasets.encoded import decode
from cit_scale.inference.classifier import Classifier, OpenedNetwork, of_each_thread
from cit_scale.inference.exported import HEAD
from cit_scale.models.network import describe
from cit_scale.models.pretrained import FILES, FOLDER, OTHER_LICENCE
from cit_scale.run_folder import DESCRIPTION

WEIGHTS = FILES[0]


def write_timm_folder(opened: OpenedNetwork, folder: Path) -> None:
    """Write weights and config.json of a network into an empty folder."""
    network, interface = opened.network, opened.interface
    # Copies: a tensor that the model has under two names is written twice, as timm loads it.
    state = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))
    description = describe(
        network,
        given_size=interface.image_size,
        crop_ratio=interface.crop_ratio,
        classes=interface.classes,
        file=WEIGHTS,
        licence=opened.description.get("license") or OTHER_LICENCE,
    )
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def open_as_timm_does(folder: Path, opened: OpenedNetwork) -> Classifier:
    """The folder as somebody opens it who has timm and ``import cit_scale.models``, and nothing else of this project.

    Images are made ready by timm's own transform.
    """
    model = timm.create_model(f"{FOLDER}{folder}", pretrained=True).eval()
    transform: Callable[[object], Tensor] = create_transform(**resolve_data_config(model=model))
    network = of_each_thread(model)

    @torch.inference_mode()
    def classify(images: Tensor) -> dict[str, Tensor]:
        return {HEAD: network()(images).float()}

    def prepare(data: bytes) -> Tensor:
        return transform(decode(data))

    return Classifier(str(folder), opened.interface, opened.description, classify, prepare_otherwise=prepare)
