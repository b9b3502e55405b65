"""Pictures, and what the stream makes of them: shared by the tests of `dali` and `stream`."""

import io
import itertools

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, auto_augment

from cit_scale.config import AugmentConfig, DataConfig
from cit_scale.data import draws
from cit_scale.data.order import Cursor
from cit_scale.data.reader import Reader
from cit_scale.data.stream import train_stream
from cit_scale.distributed.world import World

CPU = torch.device("cpu")
RECIPE = AugmentConfig()
PLAIN = AugmentConfig(policy=None, erase_prob=0.0)
DATA = DataConfig(image_size=32, decode_threads=2)
START = Cursor()
TIMM_OPERATIONS = dict(zip(draws.OPERATIONS, auto_augment._RAND_INCREASING_TRANSFORMS, strict=True))


def photo(height, width, seed):
    """A picture with smooth colours, hard edges and a little noise: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    pixels = np.stack([0.5 + 0.4 * np.sin(9 * x + seed), 0.5 + 0.4 * np.cos(7 * y - 2 * x), 0.3 + 0.6 * x * y], axis=-1)
    for _ in range(8):
        centre_y, centre_x, radius = rng.random(3) * (1, 1, 0.2)
        pixels[(y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2] = rng.random(3)
    return (255 * np.clip(pixels + rng.normal(0, 0.02, pixels.shape), 0, 1)).astype(np.uint8)


def start(source, augment=RECIPE, data=DATA, seed=0, cursor=START, sizes=(16, 16), rank=0, world_size=1):
    """The stream of a source, or of a reader of one."""
    reader = source if isinstance(source, Reader) else Reader(source)
    world = World(rank, rank, world_size, world_size)
    return train_stream(reader, augment, data, seed, cursor, *sizes, world, CPU)


def take(stream, count):
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def upright(source, index):
    """The image as PIL decodes it."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(source.read(index)))).convert("RGB")


def to_bytes(images):
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) whole numbers of 0..255."""
    return (images * 255).round().permute(0, 2, 3, 1).numpy()


def redraw(source, samples, augment, data=DATA, seed=0, epoch=0):
    """The draws that the stream must have used."""
    return draws.draw(
        seed,
        epoch,
        samples,
        np.zeros_like(samples),
        source.heights[samples],
        source.widths[samples],
        augment,
        data.image_size,
    )


def pil_crop(image, draw, i, size):
    y, x, height, width = map(int, draw.crop[i])
    image = image.crop((x, y, x + width, y + height)).resize((size, size), Image.Resampling.BICUBIC)
    return ImageOps.mirror(image) if draw.flip[i] else image


def pil_operation(image, name, argument):
    """timm's operation with a given argument; warps are bilinear, as DALI's are."""
    if name == "identity":
        return image
    if name == "gaussian_blur":
        return image.filter(ImageFilter.GaussianBlur(float(argument)))
    if name == "posterize" and argument == 0:  # Pillow refuses it since version 13
        return Image.new("RGB", image.size)
    has_argument = auto_augment.LEVEL_TO_ARG[TIMM_OPERATIONS[name]] is not None
    is_whole = name in ("posterize", "solarize", "solarize_add")
    arguments = [int(argument) if is_whole else float(argument)] if has_argument else []
    operation = auto_augment.NAME_TO_OP[TIMM_OPERATIONS[name]]
    fill = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
    return operation(image, *arguments, fillcolor=fill, resample=Image.Resampling.BILINEAR)
