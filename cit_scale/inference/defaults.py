"""Choices and defaults of the commands. Imports nothing: ``--help`` reads them."""

JUDGES = ("real", "a", "r", "v2", "sketch")  # of evaluate
FORMATS = ("text", "csv", "jsonl", "parquet")  # of predict
FRAMES_PER_S = 1.0  # of a video, in predict

SUFFIXES = {"onnx": ".onnx", "torchscript": ".torchscript", "pt2": ".pt2", "timm": ""}
"""The formats of export, and how the names of their files end."""

PRECISIONS = ("float32", "fp16", "int8")  # of export
