"""ONNX: through torch.export, in float32, fp16 or int8, with the making ready of images inside as an option."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cit_scale.errors import ConfigError
from cit_scale.export.program import INPUT, OUTPUT, Program, example_images, export_program
from cit_scale.inference.exported import add_checksum
from cit_scale.inference.interface import KEY, Interface
from cit_scale.models.network import quiet

OPSET = 20
PIXELS, PREFIX = "pixels", "ready_"  # of what goes in where images are made ready inside; of the names of that part


# `sizes` are height and width. PIL resizes the width first, then the height, and rounds to 8 bits after each. Its
# bicubic filter has a = -0.5, is wider where an image becomes smaller, and is cut off at the border.
MAKE_READY = """
<ir_version: 10, opset_import: ["" : {opset}]>
make_ready (uint8[1, height, width, 3] pixels) => (float[1, 3, {size}, {size}] images)
<int64 shorter = {{{shorter}}}, int64[2] three = {{1, 3}},
 float half = {{0.5}}, float low = {{0.0}}, float high = {{255.0}}, float[2] sides = {{{size}.0, {size}.0}},

 int64[1] second = {{1}}, int64[1] third = {{2}}, float[2] two = {{2.0, 2.0}},
 int64[2] axes = {{2, 3}}, int64[2] target = {{{size}, {size}}}>
{{
  planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
  whole = Cast <to = 1> (planes)
  rows_and_columns = Shape <start = 1, end = 3> (pixels)
  least = ReduceMin <keepdims = 0> (rows_and_columns)
  scaled = Mul (rows_and_columns, shorter)
  sizes = Div (scaled, least)
  height_there = Shape <start = 1, end = 2> (pixels)
  new_width = Slice (sizes, second, third)
  wide_sizes = Concat <axis = 0> (three, height_there, new_width)
  all_sizes = Concat <axis = 0> (three, sizes)
  wide = Resize <mode = "cubic", cubic_coeff_a = -0.5, antialias = 1, exclude_outside = 1,
                 coordinate_transformation_mode = "half_pixel"> (whole, , , wide_sizes)
  wide_up = Add (wide, half)
  wide_round = Floor (wide_up)
  wide_bytes = Clip (wide_round, low, high)
  resized = Resize <mode = "cubic", cubic_coeff_a = -0.5, antialias = 1, exclude_outside = 1,
                    coordinate_transformation_mode = "half_pixel"> (wide_bytes, , , all_sizes)
  resized_up = Add (resized, half)
  resized_round = Floor (resized_up)
  bytes = Clip (resized_round, low, high)
  sizes_float = Cast <to = 1> (sizes)
  over = Sub (sizes_float, sides)
  start_float = Div (over, two)
  start_even = Round (start_float)
  start = Cast <to = 7> (start_even)
  end = Add (start, target)
  cropped = Slice (bytes, start, end, axes)
  images = Div (cropped, high)
}}
"""


def write_onnx(program: Program, interface: Interface, path: Path, noted: str) -> None:
    """Write a program as ONNX, for any number of images. noted: what the file says of itself."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    exported = export_program(program, interface.image_size)
    with quiet("torch.onnx"), quiet("onnxscript"):
        written = torch.onnx.export(
            exported,
            (example_images(interface.image_size),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: "batch"}},
            custom_translation_table={torch.ops.cit_scale.involution.default: _involution},
            # Its patterns take a minute to be sought among a RedNet's taps; runtimes fuse nodes when they load a file.
            optimize=False,
            verbose=False,
        )
        assert written is not None
        fold_constants(written.model)
    _cut_filters_off(written.model)
    for tidy in (common.RemoveUnusedNodesPass(), common.CommonSubexpressionEliminationPass(), common.NameFixPass()):
        tidy(written.model)
    model = written.model_proto
    _note(model, interface, noted)
    _save(model, path)


def _cut_filters_off(model: Any) -> None:
    """Let antialiased resizing leave out what lies beyond the border, as PyTorch does; torch 2.11 forgets it."""
    from onnx_ir import AttrInt64

    for node in model.graph:
        if node.op_type == "Resize" and "antialias" in node.attributes and node.attributes["antialias"].as_int():
            node.attributes["exclude_outside"] = AttrInt64("exclude_outside", 1)


def _involution(x: Any, kernel: Any, stride: int) -> Any:
    """``involution`` in operators of ONNX: a slice of x and a product for each of the K x K taps.

    Not as an unfolding, whose file is smaller: a RedNet-26 takes onnxruntime four times as long with it.
    """
    from onnxscript import opset20 as op

    def numbers(*values: int) -> Any:
        return op.Constant(value_ints=values)

    _, channels, height, width = x.shape
    _, groups, size, _, out_height, out_width = kernel.shape
    pad, taps = size // 2, size**2
    extent = stride * (out_height - 1) + 1, stride * (out_width - 1) + 1
    grouped = op.Reshape(x, numbers(-1, groups, channels // groups, height, width))
    padded = op.Pad(grouped, numbers(*(0, 0, 0, pad, pad) * 2))
    kernel_taps = op.Split(
        op.Reshape(kernel, numbers(-1, groups, taps, out_height, out_width)), axis=2, num_outputs=taps
    )
    total: Any = None
    for tap, (u, v) in zip(kernel_taps, np.ndindex(size, size), strict=True):
        x_tap = op.Slice(
            padded, numbers(u, v), numbers(u + extent[0], v + extent[1]), numbers(3, 4), numbers(stride, stride)
        )
        product = op.Mul(x_tap, tap)
        total = product if total is None else op.Add(total, product)
    return op.Reshape(total, numbers(-1, channels, out_height, out_width))


def write_fp16(float_file: Path, path: Path, interface: Interface, noted: str) -> None:
    """Convert a float32 ONNX file to fp16: weights and arithmetic; images and logits stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each weight too small for fp16; what it costs is measured
        model = convert_float_to_float16(onnx.load(str(float_file)), keep_io_types=True)
    _note(model, interface, noted)
    _save(model, path)


def write_int8(float_file: Path, path: Path, images: Iterable[Tensor]) -> None:
    """Quantize a float32 ONNX file to int8, statically. images: to calibrate on, (B, 3, S, S) float32 in [0, 1]."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    prepared = path.with_name(f"{path.name}.prepared")
    try:
        with quiet("root"):  # where the library gives advice
            quant_pre_process(str(float_file), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(path),
                Images(),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
    finally:
        prepared.unlink(missing_ok=True)


def put_making_ready_inside(float_file: Path, interface: Interface, path: Path, noted: str) -> None:
    """Write a file that takes decoded images of any size, one at a time, (1, H, W, 3) uint8.

    Resizing differs from PIL's by at most one of 255 grey values, where the two round otherwise.
    """
    import onnx
    import onnx.compose
    import onnx.parser

    model = onnx.load(str(float_file))
    text = MAKE_READY.format(
        opset=OPSET, size=interface.image_size, shorter=round(interface.image_size / interface.crop_ratio)
    )
    ready = onnx.parser.parse_model(text)
    ready.ir_version = model.ir_version
    merged = onnx.compose.merge_models(ready, model, io_map=[(INPUT, INPUT)], prefix1=PREFIX)
    for node in merged.graph.node:
        node.input[:] = [PIXELS if name == f"{PREFIX}{PIXELS}" else name for name in node.input]
    merged.graph.input[0].name = PIXELS
    _note(merged, interface, noted)
    onnx.checker.check_model(merged)
    _save(merged, path)


def note_in(path: Path, interface: Interface, noted: str) -> None:
    """Write into a file what it says of itself."""
    import onnx

    model = onnx.load(str(path))
    _note(model, interface, noted)
    _save(model, path)


def _save(model: Any, path: Path) -> None:
    import onnx

    onnx.save(model, str(path))
    add_checksum(path)


def _note(model: Any, interface: Interface, noted: str) -> None:
    """classes: a name a line, for programs that read nothing else, where no name has a line break."""
    import onnx.helper

    notes = {KEY: noted}
    if not any("\n" in name or name != printable_utf8(name) for name in interface.classes):
        notes["classes"] = "\n".join(interface.classes)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, notes)


def printable_utf8(name: str) -> str:
    """The name without what UTF-8, and so ONNX, cannot hold: bytes of a folder's name that are none."""
    return name.encode("utf-8", "ignore").decode()


def require_packages() -> None:
    """Raise ConfigError unless what ONNX needs is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX needs {error.name}; pip install 'cit-scale[export]'") from None
