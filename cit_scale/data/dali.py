"""DALI pipelines for training and evaluation: decoding, crops, resizing and the policies' operations, on GPU or CPU.

The pipelines contain no randomness and no decisions: every number is an input, drawn by `cit_scale.data.draws`. Where
DALI's result differs from PIL's, or DALI is slow, the same pipeline calls PyTorch: for equalize, and on a CPU for the
resize.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, python_function_plugin, types
from nvidia.dali import math as dali_math
from nvidia.dali.auto_aug.core import select
from nvidia.dali.backend import PreallocatePinnedMemory
from nvidia.dali.data_node import DataNode
from torch import Tensor
from torch.nn import functional as F
from torch.utils import dlpack

from cit_scale.config import DataConfig
from cit_scale.data.draws import NAMES, Draw

FILL = (124, 116, 104)  # colour of the area that a warp uncovers: ImageNet's mean, as in timm
CUT_OFF = -0.499 / 255  # a shift by nearly half a grey value: DALI rounds, and then gets the result of PIL's truncation
FRAME = 1  # pixels of FILL on each side of an image that is warped

# --- Pipelines. `feed` returns the inputs of one batch per call, and raises StopIteration at the end ---


def train_arguments(draw: Draw, image_size: int) -> tuple[np.ndarray, ...]:
    """Return the inputs of `train_pipeline` after the encoded images: arrays of B rows.

    They are start and shape of the crop (B, 2), flip (B,), and for each layer of the policy the branch (B,), the
    operation's argument (B,) and the warp's matrix (B, 2, 3).
    """
    matrices = warp_matrices(draw.operations, draw.arguments, draw.flip, image_size)
    layers = zip(BRANCH_OF[draw.operations], draw.arguments, matrices, strict=True)
    arguments = draw.crop[:, :2], draw.crop[:, 2:], draw.flip.astype(np.int32), *itertools.chain.from_iterable(layers)
    return tuple(map(np.ascontiguousarray, arguments))


@pipeline_def(enable_conditionals=True)
def train_pipeline(feed: Callable, data: DataConfig, num_layers: int) -> DataNode:
    """Decode the crop, resize it, apply the policy's layers, flip.

    Returns (B, 3, image_size, image_size) float32 in [0, 1].
    feed: returns the encoded images and the arrays of `train_arguments`. num_layers: of the policy.
    """
    layer_types = [types.INT32, types.FLOAT, types.FLOAT]
    encoded, start, shape, flip, *layers = fn.external_source(
        source=feed,
        num_outputs=4 + 3 * num_layers,
        dtype=[types.UINT8, types.INT32, types.INT32, types.INT32, *layer_types * num_layers],
        ndim=[1, 1, 1, 0, *[0, 0, 2] * num_layers],
    )
    images = fn.decoders.image_slice(encoded, start=start, shape=shape, axes=(0, 1), **_decoder(data))
    images = _resize(images, types.Constant(np.array((data.image_size, data.image_size), np.int32)))
    for layer in range(num_layers):
        branch, argument, matrix = layers[3 * layer : 3 * layer + 3]
        images = select(BRANCHES, branch, images, argument, matrix)
    # The flip comes last, where it costs nothing; `warp_matrices` makes up for timm's flipping before the policy.
    return _to_unit_range(images, mirror=flip)


def eval_arguments(heights: np.ndarray, widths: np.ndarray, data: DataConfig) -> tuple[np.ndarray, ...]:
    """Return the inputs of `eval_pipeline` after the encoded images: resized size (B, 2), start of the crop (B, 2).

    Both are (height, width) in pixels. heights, widths: (B,), of the decoded images.
    """
    sides = np.stack((heights, widths), axis=1)
    sizes = round(data.image_size / data.crop_ratio) * sides // sides.min(axis=1, keepdims=True)
    return sizes.astype(np.int32), np.rint((sizes - data.image_size) / 2).astype(np.int32)


@pipeline_def
def eval_pipeline(feed: Callable, data: DataConfig) -> DataNode:
    """Decode, resize and crop.

    Returns (B, 3, image_size, image_size) float32 in [0, 1].
    feed: returns the encoded images and the arrays of `eval_arguments`.
    """
    encoded, size, start = fn.external_source(
        source=feed, num_outputs=3, dtype=[types.UINT8, types.INT32, types.INT32], ndim=1
    )
    images = _resize(fn.decoders.image(encoded, **_decoder(data)), size)
    images = fn.slice(images, start=start, shape=(data.image_size, data.image_size), axes=(0, 1))
    return _to_unit_range(images, mirror=0)


@cache  # all streams of a process share DALI's pool: reserving for each of them would lock their number times as much
def reserve_pinned_memory(mib: int) -> None:
    """Allocate page-locked host memory for all pipelines of this process, once. Call it before a pipeline is built."""
    PreallocatePinnedMemory(mib << 20)


def undecodable(encoded: Sequence[np.ndarray], crops: np.ndarray) -> list[int]:
    """Return the indices of the images that DALI's CPU decoder refuses to decode.

    encoded: B images. crops: (B, 4), the crop of each: y, x, height, width. Slow, as it decodes one image at a time:
    DALI's error for a batch need not say which image has failed.
    """
    crops = np.ascontiguousarray(crops)  # DALI refuses rows with steps, with the same error as an image

    @pipeline_def(
        batch_size=1, num_threads=1, device_id=None, exec_dynamic=False, exec_async=False, exec_pipelined=False
    )
    def decode_each(places: Iterator[int]) -> DataNode:
        def feed() -> tuple[list[np.ndarray], ...]:
            place = next(places)
            return [encoded[place]], [crops[place, :2]], [crops[place, 2:]]

        data, start, shape = fn.external_source(source=feed, num_outputs=3)
        return fn.decoders.image_slice(data, start=start, shape=shape, axes=(0, 1), output_type=types.RGB)

    refused: list[int] = []
    place = 0
    while place < len(encoded):
        pipeline = decode_each(iter(range(place, len(encoded))))
        try:
            while place < len(encoded):
                pipeline.run()
                place += 1
        except RuntimeError:  # the pipeline ends with the error; a new one continues behind the bad image
            refused.append(place)
            place += 1
    return refused


def _on_gpu() -> bool:
    """Whether the pipeline that is being defined runs on a GPU."""
    return Pipeline.current().device_id is not None


def _decoder(data: DataConfig) -> dict[str, object]:
    """Return the options of a decoder. "mixed": it takes encoded images from the CPU and leaves pixels on the GPU."""
    if not _on_gpu():
        return {"device": "cpu", "output_type": types.RGB}
    return {
        "device": "mixed",
        "output_type": types.RGB,
        "hw_decoder_load": data.hw_decoder_load,
        "jpeg_fancy_upsampling": True,  # interpolates chroma, as PIL and DALI's CPU decoder do
    }


def _resize(images: DataNode, size: DataNode) -> DataNode:
    """Resize as PIL's bicubic filter does. size: (B, 2), height and width.

    On a GPU this is DALI's resize. Its filter repeats the border pixels where PIL's filter is cut off at the border;
    the difference is visible where a few pixels become many. On a CPU it is PyTorch's resize of 8-bit images, which has
    PIL's arithmetic, vectorised, and takes a third of PIL's time and a seventh of DALI's (docs/measurements/data.md).
    """
    if _on_gpu():
        size = fn.cast(size, dtype=types.FLOAT)
        return fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
    return _in_torch(resize, images, size)


def _in_torch(function: Callable[..., Tensor], images: DataNode, *arguments: DataNode) -> DataNode:
    """On a CPU: apply a function of tensors to each image of a DALI node. Returns a node of the images it returns.

    function: takes an image (H, W, 3) uint8 and its row of each argument.
    """
    on_each = _OnEach(function, Pipeline.current().num_threads)
    return fn.dl_tensor_python_function(
        images, *arguments, function=on_each, batch_processing=True, output_layouts="HWC", device="cpu"
    )


class _OnEach:
    """Applies a function of tensors to each sample of a batch of DLPack capsules, which share DALI's memory."""

    def __init__(self, function: Callable[..., Tensor], num_threads: int) -> None:
        self._function = function
        self._num_threads = num_threads

    def __call__(self, *columns: list) -> list:
        return list(_pool(self._num_threads).map(self._on_sample, *columns))

    def _on_sample(self, *sample: object) -> object:
        return dlpack.to_dlpack(self._function(*map(dlpack.from_dlpack, sample)))


def _in_torch_together(function: Callable[[Tensor], Tensor], images: DataNode) -> DataNode:
    """On a GPU: apply a function of tensors to all images of a DALI node at once, on DALI's stream.

    function: takes and returns images (N, H, W, 3) uint8. It must not read from the device: DALI's thread would wait.
    """
    together = _Together(function, Pipeline.current().device_id)
    # Not synchronised: what `function` launches waits its turn on DALI's own stream.
    return fn.dl_tensor_python_function(
        images, function=together, batch_processing=True, synchronize_stream=False, output_layouts="HWC", device="gpu"
    )


class _Together:
    """Applies a function of tensors to a batch of DLPack capsules on a GPU, as one tensor, on DALI's stream.

    torch's own current stream in DALI's thread would be the default one, which is the training's: images and training
    would wait for each other.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], device_id: int) -> None:
        self._function = function
        self._device = torch.device("cuda", device_id)

    def __call__(self, images: list) -> list:
        if not images:  # a branch of `select` that no image takes
            return []
        # DALI copies the result on its stream after this returns, when Python has let go of the memory. That is safe:
        # torch hands memory allocated under a stream only to later work of the same stream, which the copy precedes.
        pointer = python_function_plugin.current_dali_stream()
        with torch.cuda.stream(torch.cuda.ExternalStream(pointer, device=self._device)):
            tensors = [dlpack.from_dlpack(image) for image in images]
            assert all(tensor.shape == tensors[0].shape for tensor in tensors)  # resized to image_size before
            return [dlpack.to_dlpack(image) for image in self._function(torch.stack(tensors)).unbind()]


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    """Return the process's thread pool for functions of `_in_torch`, beside DALI's own threads.

    It lives as long as the process: nothing tells when DALI releases the functions of a pipeline.
    """
    return ThreadPoolExecutor(num_threads, "torch")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process inherits the pool without its threads


def resize(image: Tensor, size: Tensor) -> Tensor:
    """Resize an (H, W, 3) uint8 image with PyTorch's bicubic filter, antialiased. size: (2,), height and width."""
    height, width = size.tolist()
    resized = F.interpolate(image.permute(2, 0, 1)[None], size=(height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0)


def _to_unit_range(images: DataNode, mirror: DataNode | int) -> DataNode:
    """Convert (H, W, 3) uint8 to (3, H, W) float32 in [0, 1]; exchange left and right where `mirror` is 1."""
    return fn.crop_mirror_normalize(
        images, mirror=mirror, dtype=types.FLOAT, output_layout="CHW", mean=[0.0] * 3, std=[255.0] * 3
    )


# --- Operations of the policies: what timm does with PIL, on (H, W, 3) uint8 ---


def warp_matrices(operations: np.ndarray, arguments: np.ndarray, flip: np.ndarray, image_size: int) -> np.ndarray:
    """Return the affine matrix of each drawn warp, (L, B, 2, 3) float32. operations, arguments: (L, B). flip: (B,).

    A matrix maps output pixels to input pixels, as PIL's do, with two changes: the input has a frame of FRAME pixels
    (see `_warp`), and an image with `flip` is mirrored after the warp here, while timm mirrors it before.
    Operations that do not warp get the identity.
    """
    matrices = np.zeros((*operations.shape, 2, 3))
    matrices[..., 0, 0] = matrices[..., 1, 1] = 1
    # Name -> row and column of the matrix entry that the argument sets, and the argument's unit in pixels.
    entries = {
        "shear_x": (0, 1, 1),
        "shear_y": (1, 0, 1),
        "translate_x": (0, 2, image_size),
        "translate_y": (1, 2, image_size),
    }
    for name, (row, column, scale) in entries.items():
        drawn = operations == NAMES.index(name)
        matrices[drawn, row, column] = scale * arguments[drawn]
    rotated = operations == NAMES.index("rotate")
    angles = np.deg2rad(arguments[rotated].astype(np.float64))
    cos, sin, centre = np.cos(angles), np.sin(angles), image_size / 2
    # A rotation about the centre of the image.
    rows = (cos, -sin, centre * (1 - cos + sin)), (sin, cos, centre * (1 - sin - cos))
    matrices[rotated] = np.moveaxis(np.array(rows), -1, 0)
    # With F: x -> image_size - x, mirroring and then M is the same as F M F and then mirroring. The result of F M F:
    a, b, c, d, e, f = np.moveaxis(matrices.reshape(*operations.shape, 6), -1, 0)
    mirrored = np.stack((a, -b, image_size * (1 - a) - c, -d, e, f + d * image_size), axis=-1)
    matrices = np.where(flip[:, None, None], mirrored.reshape(matrices.shape), matrices)
    matrices[..., 2] += FRAME
    return matrices.astype(np.float32)


def _identity(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    return images


def _warp(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    """Warp bilinearly, since DALI has no bicubic warp.

    DALI can only fill uncovered areas with one value for all channels. Instead the image gets a frame of the fill
    colour, and the warp repeats the border pixels. The arithmetic stays 8-bit, which is about twice as fast as
    subtracting the colour, filling with 0 and adding it again (docs/measurements/data.md).
    """
    size = images.shape(dtype=types.INT32)[:2]
    framed = fn.slice(
        images,
        start=(-FRAME, -FRAME),
        shape=size + 2 * FRAME,
        axes=(0, 1),
        out_of_bounds_policy="pad",
        fill_values=FILL,
    )
    return fn.warp_affine(framed, matrix=matrix, size=fn.cast(size, dtype=types.FLOAT))


def _auto_contrast(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    """Stretch each channel to 0 ... 255, as PIL's ImageOps.autocontrast."""
    low = fn.reductions.min(images, axis_names="HW", keep_dims=True)
    high = fn.reductions.max(images, axis_names="HW", keep_dims=True)
    span = high - low + 255 * (low == high)  # 255 for a channel of one value, which is left unchanged
    return fn.cast((images - low * (low < high)) * 255 // span, dtype=types.UINT8)


def _equalize(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    """Equalize in PyTorch: DALI has OpenCV's formula, which differs from PIL's by 2 of 255 at 224 pixels, 13 at 32."""
    return _in_torch_together(equalize_together, images) if _on_gpu() else _in_torch(equalize, images)


def equalize(image: Tensor) -> Tensor:
    """Compute PIL's ImageOps.equalize of an (H, W, 3) uint8 image.

    For a CPU, where bincount is several times as fast as what `equalize_together` does. On a GPU bincount reads the
    largest value back, twice.
    """
    bins = _bins(image[None], torch.int32)
    counts = torch.bincount(bins, minlength=768)
    return _equalized(bins, counts.reshape(3, 256)).reshape(image.shape)


def equalize_together(images: Tensor) -> Tensor:
    """Compute PIL's ImageOps.equalize of each of (N, H, W, 3) uint8 images, with as many launches for any N.

    For a GPU: nothing is read from it.
    """
    bins = _bins(images, torch.int64)
    counts = bins.new_zeros(len(images) * 768).scatter_add_(0, bins, torch.ones_like(bins))
    return _equalized(bins, counts.reshape(-1, 256)).reshape(images.shape)


def _bins(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return each value's place in one histogram, with 256 places for each channel of each image, (N H W 3,).

    images: (N, H, W, 3) uint8.
    """
    first = torch.arange(0, 768 * len(images), 256, dtype=dtype, device=images.device)
    return (images.flatten(1, 2).to(dtype) + first.reshape(-1, 1, 3)).flatten()


def _equalized(bins: Tensor, counts: Tensor) -> Tensor:
    """Return the equalized values, uint8, in the order of `bins`. counts: the histogram, (3 N, 256).

    As in PIL, `step` is the number of pixels per new grey value, rounded down; a channel with step 0 stays unchanged.
    """
    last = 255 - (counts.flip(1) > 0).int().argmax(dim=1, keepdim=True)  # the highest value that occurs
    step = (counts.sum(dim=1, keepdim=True) - counts.gather(1, last)) // 255
    below = counts.cumsum(dim=1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=counts.device)).to(torch.uint8)
    return table.flatten().index_select(0, bins)


def _invert(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    return images ^ types.Constant(255, dtype=types.UINT8)


def _posterize(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    # A mask of the `argument` highest bits.
    return images & fn.cast(256 - dali_math.pow(2.0, 8 - argument), dtype=types.UINT8)


def _solarize(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    # x ^ 255 = 255 - x, in 8 bits.
    return images ^ ((images >= argument) * types.Constant(255, dtype=types.UINT8))


def _solarize_add(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    return images + (images < 128) * fn.cast(argument, dtype=types.UINT8)  # at most 127 + 110: no overflow


# The next three are PIL's Image.blend with black, with the mean grey value and with the grey image. PIL truncates the
# result instead of rounding it, hence CUT_OFF.


def _brightness(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    return fn.brightness_contrast(images, brightness=argument, brightness_shift=CUT_OFF)


def _contrast(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    mean = dali_math.floor(fn.reductions.mean(_grey(images)) + 0.5)
    mean = mean.cpu() if images.device == "gpu" else mean  # per-sample arguments of an operator are on the CPU
    return fn.brightness_contrast(images, contrast=argument, contrast_center=mean, brightness_shift=CUT_OFF)


def _color(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    blended = images * argument + _grey(images) * (1 - argument)  # float; the next line makes bytes of it
    # fn.cast to bytes would take over ten times as long (docs/measurements/data.md).
    return fn.brightness_contrast(blended, brightness_shift=CUT_OFF, dtype=types.UINT8)


def _grey(images: DataNode) -> DataNode:
    """Convert to grey, (H, W, 1), by ITU-R 601, as PIL does."""
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _sharpness(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    """Blend with PIL's smoothed image (ImageFilter.SMOOTH): towards it below an argument of 1, away from it above."""
    # Blending is linear, so it is done with the kernels: one filter instead of a filter and a blend.
    smooth = types.Constant(np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13)
    same = types.Constant(np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32))
    kernel = same * argument + smooth * (1 - argument)
    return fn.filter(images, kernel.gpu() if images.device == "gpu" else kernel)


def _gaussian_blur(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    return fn.gaussian_blur(images, sigma=argument)


# Operation -> the function of (images, argument, matrix) that computes it. Each uses the inputs that it needs.
COMPUTED_BY: dict[str, Callable[[DataNode, DataNode, DataNode], DataNode]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _warp,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _warp,
    "shear_y": _warp,
    "translate_x": _warp,
    "translate_y": _warp,
    "gaussian_blur": _gaussian_blur,
    "identity": _identity,
}

# The branches of `select`, and for each operation of NAMES the index of its branch. All warps share one branch: DALI
# splits a batch by branch, and fewer branches get larger batches.
BRANCHES = list(dict.fromkeys(COMPUTED_BY.values()))
BRANCH_OF = np.array([BRANCHES.index(COMPUTED_BY[name]) for name in NAMES], np.int32)
