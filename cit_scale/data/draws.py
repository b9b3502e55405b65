"""Draws the augmentation of training images: every random number is a pure function of (seed, epoch, sample, repeat).

The generator is counter-based: word j of a sample is Philox4x32-10 at counter (j // 4, repeat, sample, epoch) with the
key `seed`. A draw therefore does not depend on the other samples of the batch, on the rank, or on earlier draws. The
distributions are timm's: RandomResizedCropAndInterpolation, flip, RandAugment, 3-Augment, RandomErasing.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from cit_scale.config import AugmentConfig
from cit_scale.errors import ConfigError

# --- The generator ---


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> np.ndarray:
    """Compute Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    counter: four arrays of 32-bit words, which are broadcast to a common shape. key: two 32-bit words.
    Returns four words per counter, (4, *shape) uint64, each below 2**32.
    """
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    k0, k1 = key
    # Multipliers and key increments are those of the paper.
    for _ in range(10):
        left, right = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)  # 32 x 32 bits fit into 64
        c0, c1 = (right >> shift) ^ c1 ^ np.uint64(k0), right & mask
        c2, c3 = (left >> shift) ^ c3 ^ np.uint64(k1), left & mask
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def random_words(seed: int, epoch: int, samples: np.ndarray, repeats: np.ndarray, num_words: int) -> np.ndarray:
    """Return `num_words` random words for each sample, (num_words, B) uint64, each below 2**32.

    seed: 0 to 2**64 - 1; ValueError otherwise. samples, repeats: (B,) integers.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} is not a 64-bit number; use one from 0 to {2**64 - 1}")
    blocks = np.arange(-(-num_words // 4))[:, None]
    words = philox((blocks, repeats, samples, np.asarray(epoch)), (seed & 0xFFFFFFFF, seed >> 32))  # (4, blocks, B)
    # One contiguous row per word, at any batch size. NumPy has different loops for contiguous and strided memory, whose
    # results may differ in the last bits; the size of the batch must not choose between them.
    return words.swapaxes(0, 1).reshape(-1, words.shape[-1])[:num_words]


# The words of a sample that each decision reads. Moving one changes the images of every run, also of resumed ones.
CROP_AREA, CROP_RATIO = slice(0, 10), slice(10, 20)  # ten attempts
CROP_Y, CROP_X = 20, 21
FLIP = 22
ERASE = 23
ERASE_AREA, ERASE_RATIO = slice(24, 34), slice(34, 44)  # ten attempts
ERASE_Y, ERASE_X = 44, 45
ERASE_KEY = slice(46, 48)
POLICY = 48  # this word and the following ones; their number depends on the policy

# --- Policies: layers of operations, each operation with an argument ---


@dataclass(frozen=True)
class RandAugment:
    """RandAugment (arXiv:1909.13719) with timm's parameters; the defaults are those of timm's notation."""

    magnitude: float = 10.0
    """0 (none) to 10 (full)."""

    magnitude_std: float = 0.0
    """Standard deviation of the magnitude, which is then clipped to [0, 10]."""

    increasing: bool = False
    """Use the variants of the operations whose effect grows with the magnitude."""

    num_layers: int = 2
    """Operations drawn per image, with replacement."""

    prob: float = 0.5
    """Probability that a drawn operation is applied."""

    @property
    def num_words(self) -> int:
        """Random words per image, see `_draw_randaugment`."""
        return 5 * self.num_layers


@dataclass(frozen=True)
class ThreeAugment:
    """DeiT III's 3-Augment (arXiv:2204.07118): always one of greyscale, solarize and blur; then colour jitter."""

    jitter: float = 0.3
    """Brightness, contrast and colour are each multiplied by 1 - jitter to 1 + jitter, in random order."""

    num_layers: ClassVar[int] = 4
    num_words: ClassVar[int] = 6


Policy = RandAugment | ThreeAugment


@cache
def read_policy(text: str | None) -> Policy | None:
    """Return the policy of the setting AugmentConfig.policy; None for none. Raises ConfigError for an unknown one."""
    try:
        return None if text is None else parse_policy(text)
    except ValueError as error:
        raise ConfigError(f"augment.{error}") from None


def parse_policy(text: str) -> Policy:
    """Parse timm's notation: '3a', or RandAugment as in 'rand-m9-mstd0.5-inc1'. Raises ValueError for anything else."""
    if text != "3a" and not text.startswith("rand"):
        raise ValueError(f"policy={text!r} is not known; use 3a, rand-m9-mstd0.5-inc1 with your own numbers, or null")
    return ThreeAugment() if text == "3a" else parse_randaugment(text)


def parse_randaugment(text: str) -> RandAugment:
    """Parse timm's notation, as in 'rand-m9-mstd0.5-inc1'. Raises ValueError that names all parts it cannot parse."""
    readers: dict[str, tuple[str, str, Callable[[str], Any]]] = {
        "m": ("magnitude", "10|[0-9]", float),
        "mstd": ("magnitude_std", r"\d+(?:\.\d+)?", float),
        "inc": ("increasing", "[01]", lambda digit: digit == "1"),
        "n": ("num_layers", r"[1-9]\d?", int),
        "p": ("prob", r"0(?:\.\d+)?|1(?:\.0+)?", float),
    }
    kind, *parts = text.split("-")
    unreadable = [] if kind == "rand" else [kind]
    options: dict[str, Any] = {}
    for part in parts:
        value = part.lstrip(string.ascii_lowercase)
        key = part.removesuffix(value)
        name, pattern, read = readers.get(key, ("", "(?!)", str))  # an unknown key matches nothing
        if re.fullmatch(pattern, value):
            options[name] = read(value)
        else:
            unreadable.append(part)
    if unreadable:
        raise ValueError(
            f"policy={text!r}: cannot read {', '.join(map(repr, unreadable))}; write rand followed by any of "
            f"-m0..10 (magnitude), -mstd0.5 (its deviation), -inc0 or 1, -n2 (layers), -p0..1 (probability of each), "
            f"or null for none"
        )
    return RandAugment(**options)


# How each operation's argument follows from level = magnitude / 10 and sign = -1 or 1. The rows are in timm's order,
# which decides the operation that a random number selects. `0 * level`: the operation takes no argument.
OPERATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "auto_contrast": lambda level, sign: 0 * level,
    "equalize": lambda level, sign: 0 * level,
    "invert": lambda level, sign: 0 * level,
    "rotate": lambda level, sign: 30 * level * sign,  # degrees, counter-clockwise
    "posterize": lambda level, sign: np.floor(4 * level),  # bits kept
    "solarize": lambda level, sign: np.floor(256 * level),  # values from this threshold on are inverted
    "solarize_add": lambda level, sign: np.floor(110 * level),  # added to values below 128
    "color": lambda level, sign: 0.1 + 1.8 * level,  # factor; 1 is no change, here and in the next three
    "contrast": lambda level, sign: 0.1 + 1.8 * level,
    "brightness": lambda level, sign: 0.1 + 1.8 * level,
    "sharpness": lambda level, sign: 0.1 + 1.8 * level,
    "shear_x": lambda level, sign: 0.3 * level * sign,
    "shear_y": lambda level, sign: 0.3 * level * sign,
    "translate_x": lambda level, sign: 0.45 * level * sign,  # share of the width
    "translate_y": lambda level, sign: 0.45 * level * sign,  # share of the height
}
INCREASING_OPERATIONS = OPERATIONS | {
    "posterize": lambda level, sign: 4 - np.floor(4 * level),
    "solarize": lambda level, sign: 256 - np.floor(256 * level),
    "color": lambda level, sign: np.maximum(0.1, 1 + 0.9 * level * sign),
    "contrast": lambda level, sign: np.maximum(0.1, 1 + 0.9 * level * sign),
    "brightness": lambda level, sign: np.maximum(0.1, 1 + 0.9 * level * sign),
    "sharpness": lambda level, sign: np.maximum(0.1, 1 + 0.9 * level * sign),
}

# All operations that a layer can have; RandAugment draws from the first 15. The blur's argument is sigma in pixels.
NAMES = (*OPERATIONS, "gaussian_blur", "identity")
IDENTITY = NAMES.index("identity")  # stands for a drawn operation that is not applied


def _draw_randaugment(uniforms: np.ndarray, options: RandAugment) -> tuple[np.ndarray, np.ndarray]:
    """Draw operations (L, B) and arguments (L, B). uniforms: (5 L, B) in [0, 1).

    A layer reads five numbers: operation, whether it is applied, sign, and two for the magnitude's deviation.
    """
    per_layer = uniforms.reshape(options.num_layers, 5, -1)
    which, whether, side, radius, angle = np.ascontiguousarray(per_layer.swapaxes(0, 1))  # each (L, B)
    operations = (which * len(OPERATIONS)).astype(np.int32)
    normals = np.sqrt(-2 * np.log(1 - radius)) * np.cos(2 * np.pi * angle)  # Box-Muller; 1 - radius is never 0
    levels = np.clip(options.magnitude + options.magnitude_std * normals, 0, 10) / 10
    signs = np.where(side < 0.5, 1.0, -1.0)
    table = INCREASING_OPERATIONS if options.increasing else OPERATIONS
    # Compute the arguments of all 15 operations for every image and select one: a loop over the images in Python would
    # be slower.
    arguments = np.stack([argument(levels, signs) for argument in table.values()])  # (15, L, B)
    arguments = np.take_along_axis(arguments, operations[None], axis=0)[0]
    return np.where(whether < options.prob, operations, IDENTITY), arguments


# The six orders of the colour jitter, (6, 3): indices into NAMES.
JITTER_ORDERS = np.array(
    list(itertools.permutations(NAMES.index(name) for name in ("brightness", "contrast", "color")))
)


def _draw_three_augment(uniforms: np.ndarray, options: ThreeAugment) -> tuple[np.ndarray, np.ndarray]:
    """Draw operations (4, B) and arguments (4, B). uniforms: (6, B) in [0, 1).

    The six numbers: which of the three operations, the sigma of the blur, the order of the jitter, its three factors.
    """
    which, radius, order, *factors = uniforms
    # timm's values: solarize from 128 on, colour factor 0 (greyscale), a blur of 0.1 to 2 pixels.
    first = np.array([NAMES.index(name) for name in ("solarize", "color", "gaussian_blur")])[(which * 3).astype(int)]
    argument = np.select(
        [first == NAMES.index("solarize"), first == NAMES.index("color")], [128, 0], 0.1 + 1.9 * radius
    )
    jitter = JITTER_ORDERS[(order * len(JITTER_ORDERS)).astype(int)].T  # (3, B)
    scales = 1 + options.jitter * (2 * np.stack(factors) - 1)
    return np.vstack((first, jitter)), np.vstack((argument, scales))


def _draw_policy(uniforms: np.ndarray, policy: Policy | None) -> tuple[np.ndarray, np.ndarray]:
    """Draw operations (L, B) and arguments (L, B); L is 0 without a policy."""
    if policy is None:
        nothing = np.zeros((0, uniforms.shape[-1]))
        return nothing, nothing
    if isinstance(policy, ThreeAugment):
        return _draw_three_augment(uniforms, policy)
    return _draw_randaugment(uniforms, policy)


# --- Boxes of the crop and of random erasing ---


def _first_that(fits: np.ndarray, *tries: np.ndarray) -> tuple[np.ndarray, ...]:
    """Select from each array of attempts (10, B) the first that fits, (B,); where none fits, attempt 0.

    fits: (10, B) bool.
    """
    first = fits.argmax(axis=0), np.arange(fits.shape[1])
    return tuple(values[first] for values in tries)


def _draw_crop(
    uniforms: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Draw crops, (B, 4): y, x, height, width in pixels. heights, widths: (B,), of the images.

    scale: range of the crop's share of the image's area. ratio: range of width / height. After ten attempts that do not
    fit into the image, the crop is the largest central one whose ratio is in range.
    """
    areas = (scale[0] + (scale[1] - scale[0]) * uniforms[CROP_AREA]) * (heights * widths)
    low, high = np.log(ratio)  # ratios are uniform in their logarithm
    ratios = np.exp(low + (high - low) * uniforms[CROP_RATIO])
    h, w = np.rint(np.sqrt(areas / ratios)), np.rint(np.sqrt(areas * ratios))
    fits = (h > 0) & (h <= heights) & (w > 0) & (w <= widths)
    h, w = _first_that(fits, h, w)
    y, x = np.floor(uniforms[CROP_Y] * (heights - h + 1)), np.floor(uniforms[CROP_X] * (widths - w + 1))

    central_h = np.where(widths < ratio[0] * heights, np.rint(widths / ratio[0]), heights)
    central_w = np.where(widths > ratio[1] * heights, np.rint(heights * ratio[1]), widths)
    central = np.stack(((heights - central_h) // 2, (widths - central_w) // 2, central_h, central_w))
    return np.where(fits.any(axis=0), np.stack((y, x, h, w)), central).T


def _draw_erasing(uniforms: np.ndarray, image_size: int, prob: float) -> np.ndarray:
    """Draw boxes to erase, (B, 4): y, x, height, width in pixels; zeros where nothing is erased.

    A box has 2 % to 1/3 of the image's area and height / width from 0.3 to 1 / 0.3. After ten attempts that do not fit
    into the image, nothing is erased.
    """
    areas = (0.02 + (1 / 3 - 0.02) * uniforms[ERASE_AREA]) * image_size**2
    low, high = np.log((0.3, 1 / 0.3))
    ratios = np.exp(low + (high - low) * uniforms[ERASE_RATIO])
    h, w = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (h < image_size) & (w < image_size)
    h, w = _first_that(fits, h, w)
    y, x = np.floor(uniforms[ERASE_Y] * (image_size - h + 1)), np.floor(uniforms[ERASE_X] * (image_size - w + 1))
    return np.where(fits.any(axis=0) & (uniforms[ERASE] < prob), np.stack((y, x, h, w)), 0).T


# --- The whole augmentation ---


@dataclass(frozen=True)
class Draw:
    """The augmentation of B images, as numbers. L is the policy's number of layers, 0 without a policy."""

    crop: np.ndarray
    """(B, 4) int32: y, x, height, width in pixels of the decoded image."""

    flip: np.ndarray
    """(B,) bool: whether to exchange left and right."""

    operations: np.ndarray
    """(L, B) int32: indices into NAMES."""

    arguments: np.ndarray
    """(L, B) float32: in the unit of each operation, see OPERATIONS."""

    erasing: np.ndarray
    """(B, 4) int32: y, x, height, width in pixels of the resized image; zeros where nothing is erased."""

    erasing_key: np.ndarray
    """(B,) uint64: the seed of the noise that fills the box."""


def draw(
    seed: int,
    epoch: int,
    samples: np.ndarray,
    repeats: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    augment: AugmentConfig,
    image_size: int,
) -> Draw:
    """Draw the augmentation of B images.

    samples, repeats, heights, widths: (B,) integers; heights and widths in pixels of the decoded images. image_size:
    height and width of the resized images. Raises ConfigError for an unknown policy, ValueError for a wrong seed.
    """
    policy = read_policy(augment.policy)
    words = random_words(seed, epoch, samples, repeats, POLICY + (policy.num_words if policy else 0))
    uniforms = words * 2.0**-32  # in [0, 1)
    operations, arguments = _draw_policy(uniforms[POLICY:], policy)
    low, high = words[ERASE_KEY]
    return Draw(
        crop=_draw_crop(uniforms, heights, widths, augment.crop_scale, augment.crop_ratio).astype(np.int32),
        flip=uniforms[FLIP] < augment.flip_prob,
        operations=operations.astype(np.int32),
        arguments=arguments.astype(np.float32),
        erasing=_draw_erasing(uniforms, image_size, augment.erase_prob).astype(np.int32),
        erasing_key=low | high << np.uint64(32),
    )
