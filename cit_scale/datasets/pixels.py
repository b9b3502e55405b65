"""The versions of pixels by number: how images are measured, made ready for DALI and decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

from PIL import Image

from cit_scale.datasets import encoded, encoded_v1


class Pixels(Protocol):
    """A version of pixels, as the modules `encoded` and `encoded_v1` have it."""

    VERSION: int

    def measure(self, read: Callable[[int, int], bytes]) -> tuple[int, int]: ...

    def for_dali(self, data: bytes) -> tuple[bytes, tuple[int, int] | None] | None: ...

    def decode(self, data: bytes) -> Image.Image: ...


LATEST = cast(Pixels, encoded)
BY_VERSION: dict[int, Pixels] = {each.VERSION: cast(Pixels, each) for each in (encoded_v1, encoded)}
