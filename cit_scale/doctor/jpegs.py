"""The JPEG decoder of the evaluation stream, while the device's default stream is busy: are its bytes the same each
time, and near PIL's?

On a GPU at each share of images for the hardware decoder (data.hw_decoder_load). nvJPEG before 13.3 wrote on H100 while
earlier work still read (torchvision PR 9606): images were then mixed up now and then, without an error.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cit_scale.bench.decode import photo, to_jpeg
from cit_scale.bench.fidelity import LIMITS
from cit_scale.config import DataConfig
from cit_scale.data import dali
from cit_scale.distributed.world import World
from cit_scale.doctor.findings import Asked, Finding, failed, ok, warning

LOADS = (0.0, 0.65, 1.0)
SIZE = 256  # pixels of each side, before and after: nothing is resized
IMAGES, REPEATS = 32, 20
QUICK_IMAGES, QUICK_REPEATS = 4, 3
WORK = 20  # products of large matrices, some milliseconds, queued on a GPU before each batch
# Mean difference of a byte from PIL's. DALI's decoder on a CPU is libjpeg's, as PIL's; nvJPEG rounds otherwise.
ALLOWED = {"cpu": 0.0, "cuda": LIMITS["cuda"].decoded}


def check(asked: Asked) -> Finding:
    """Decode two batches of images in turns, again and again."""
    device = World().device
    loads = LOADS if device.type == "cuda" else LOADS[:1]
    images, repeats = (QUICK_IMAGES, QUICK_REPEATS) if asked.quick else (IMAGES, REPEATS)
    batches = [[to_jpeg(photo(SIZE, SIZE, first + place)) for place in range(images)] for first in (0, images)]
    found = {load: compare(decode(batches, load, device), batches, repeats) for load in loads}
    return judge(found, images, repeats, device.type)


def decode(batches: Sequence[Sequence[bytes]], load: float, device: torch.device) -> Iterator[Tensor]:
    """Decode the batches in turns without end, with the evaluation stream's pipeline, while the default stream works.

    batches: as many square images of SIZE pixels in each. Yields bytes (B, 3, SIZE, SIZE) on the device.
    """
    has_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device) if has_gpu else None
    work = torch.randn(4096, 4096, device=device) if has_gpu else torch.zeros(1, 1)
    data, sides = DataConfig(image_size=SIZE, crop_ratio=1.0, hw_decoder_load=load), np.full(len(batches[0]), SIZE)
    turns = itertools.cycle([np.frombuffer(each, np.uint8) for each in batch] for batch in batches)
    pipeline = dali.eval_pipeline(
        lambda: (next(turns), *dali.eval_arguments(sides, sides, data)),
        data,
        batch_size=len(sides),
        num_threads=2,
        device_id=device.index if has_gpu else None,
    )
    while True:
        for _ in range(WORK if has_gpu else 0):
            torch.mm(work, work)
        (decoded,) = pipeline.run(stream)
        yield (torch.from_dlpack(decoded.as_tensor()) * 255).round().byte()


def compare(decoded: Iterator[Tensor], batches: Sequence[Sequence[bytes]], repeats: int) -> tuple[int, float]:
    """How many times a batch differs from its first time, and the mean difference of the first ones from PIL.

    decoded: the batches in turns, bytes (B, 3, H, W).
    """
    firsts = [next(decoded) for _ in batches]
    # Counted on the device, and read once: to wait for each batch would leave the decoder nothing to run into.
    count = torch.zeros((), dtype=torch.int64, device=firsts[0].device)
    for _ in range(repeats - 1):
        for first in firsts:
            count += (next(decoded) != first).any()
    differing = int(count.item())
    distances = [
        np.abs(first[place].permute(1, 2, 0).cpu().numpy().astype(float) - np.asarray(Image.open(io.BytesIO(encoded))))
        for first, batch in zip(firsts, batches, strict=True)
        for place, encoded in enumerate(batch)
    ]
    return differing, float(np.mean(distances))


def judge(found: Mapping[float, tuple[int, float]], images: int, repeats: int, device_type: str) -> Finding:
    """found: by load, as of ``compare``."""
    at = {load: f" at hw_decoder_load={load:g}" if device_type == "cuda" else "" for load in found}
    wrong = {
        load: f"{count} of {2 * (repeats - 1)} batches have other bytes than before"
        for load, (count, _) in found.items()
        if count
    }
    for load, (_, distance) in found.items():
        if not distance <= ALLOWED[device_type]:  # NaN, too
            wrong.setdefault(load, f"{distance:.2f} of 255 from PIL")
    if wrong:
        says = "; ".join(f"{what}{at[load]}" for load, what in wrong.items())
        if 0.0 in wrong:
            return failed(says, "take another version of nvidia-dali, and report this one")
        return warning(says, "leave data.hw_decoder_load at 0, as it is by default")
    distances = ", ".join(f"{distance:.3f}{at[load]}" for load, (_, distance) in found.items())
    return ok(
        f"2 batches of {images} images, {repeats} times the same bytes; mean difference from PIL {distances} of 255"
    )
