"""What an image classifier takes and gives: the contract of a network, and of every file that is exported of one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from cit_scale.errors import ConfigError, one_line

LEAST_CROP = 0.05  # of crop_ratio: an image is resized to twenty times the size that the network sees, at most

FORMAT = 1  # of the text below; a file of another one is refused
KEY = "cit_scale.json"  # under which a file holds the text


@dataclass(frozen=True)
class Interface:
    """What goes in and comes out.

    classes: names, in the order of the logits. heads: names of the logits that come out; of an exported file one.
    image_size: height and width of the images that go in. crop_ratio: in making them ready the shorter side is resized
    to image_size / crop_ratio, bicubic with antialiasing, and the centre is cropped.
    pixels: whether decoded images of any size go in one at a time, (1, H, W, 3) uint8, and are resized inside;
    otherwise images (B, 3, image_size, image_size) float32 in [0, 1]. They are normalised inside either way.
    """

    classes: tuple[str, ...]
    heads: tuple[str, ...]
    image_size: int
    crop_ratio: float
    pixels: bool = False

    def to_json(self, **more: Any) -> str:
        """The text that an exported file holds. more: what else is to be noted there, for people."""
        return json.dumps({"format": FORMAT, **asdict(self), **more, "sha256": "0" * 64})


def read_interface(text: str | None, file: object) -> Interface:
    """Read the text of an exported file. Raises ConfigError."""
    if text is None:
        raise ConfigError(
            f"{file} was not written by cit-scale export: it does not say its classes and how images are made ready"
        )
    try:
        content = json.loads(text)
        if content.pop("format") != FORMAT:
            raise ValueError("it has another format")
        found = Interface(**{key: content[key] for key in ("classes", "heads", "image_size", "crop_ratio", "pixels")})
        for key, names in (("classes", found.classes), ("heads", found.heads)):
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"its {key} are no list of names")
        size, ratio = found.image_size, found.crop_ratio
        if type(size) is not int or size < 1 or type(ratio) not in (int, float) or not LEAST_CROP <= ratio <= 1:
            raise ValueError(f"image_size={size!r} or crop_ratio={ratio!r} is none")
        if type(found.pixels) is not bool:
            raise ValueError(f"pixels={found.pixels!r} is neither true nor false")
        return replace(found, classes=tuple(found.classes), heads=tuple(found.heads))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} cannot be read: what it says of its classes is damaged: {one_line(error)}"
        ) from error
