"""Where there is no GPU, Triton's kernels run in its interpreter. It has to be chosen before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """40 images in two classes, of several sizes, file formats and colour modes, some turned by EXIF."""
    from stream_cases import photo

    from cit_scale.data.sources import ImageFolder

    folder = tmp_path_factory.mktemp("photos")
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(40):
        image = Image.fromarray(photo(40 + 3 * i, 150 - 2 * i, seed=i))
        path = folder / f"class{i % 2}"
        path.mkdir(exist_ok=True)
        if i % 8 == 0:
            image.save(path / f"{i:02d}.jpg", exif=turned)
        elif i % 8 == 1:
            image.convert("L").save(path / f"{i:02d}.png")
        elif i % 8 == 2:
            image.convert("RGBA").save(path / f"{i:02d}.png")
        elif i % 8 == 3:
            image.convert("CMYK").save(path / f"{i:02d}.jpg")
        else:
            image.save(path / f"{i:02d}.jpg", quality=90)
    return ImageFolder(folder, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_digits(tmp_path_factory):
    from cit_scale.data.sources import digits

    return digits(tmp_path_factory.mktemp("digits"))
