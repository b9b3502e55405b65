"""The JPEG decoder of the evaluation stream, while the device's default stream is busy: are its bytes the same each
time, and near PIL's?

On a GPU at each share of images for the hardware decoder (data.hw_decoder_load). nvJPEG before 13.3 wrote on H100 while
earlier work still read (torchvision PR 9606): images were then mixed up now and then, without an error.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cit_scale.bench.decode import photo, to_jpeg
from cit_scale.config import DataConfig
from cit_scale.data import dali
from cit_scale.distributed.world import World
from cit_scale.doctor.findings import Asked, Finding, failed, ok, warning

LOADS = (0.0, 0.65, 1.0)
SIZE = 256  # pixels of each side, before and after: nothing is resized
IMAGES, REPEATS, QUICK_REPEATS = 32, 20, 3
# Mean difference of a byte from PIL's. DALI's decoder on a CPU is libjpeg's, as PIL's; nvJPEG rounds otherwise.
ALLOWED = {"cpu": 0.0, "cuda": 1.0}

Decode = Callable[[Sequence[bytes], float], Tensor]
"""Images, all of them square with SIZE pixels, and the load of the hardware decoder, to bytes (B, 3, SIZE, SIZE)."""


def check(asked: Asked) -> Finding:
    """Decode the same images again and again."""
    device = World().device
    loads = LOADS if device.type == "cuda" else LOADS[:1]
    encoded = [to_jpeg(photo(SIZE, SIZE, seed)) for seed in range(4 if asked.quick else IMAGES)]
    repeats = QUICK_REPEATS if asked.quick else REPEATS
    found = {load: compare(decoder(device), encoded, load, repeats) for load in loads}
    return judge(found, len(encoded), repeats, device.type)


def decoder(device: torch.device) -> Decode:
    """The evaluation stream's pipeline, with work queued on the default stream before each batch."""
    has_gpu = device.type == "cuda"
    work = torch.randn(4096, 4096, device=device) if has_gpu else torch.zeros(0)

    def decode(encoded: Sequence[bytes], load: float) -> Tensor:
        data = DataConfig(image_size=SIZE, crop_ratio=1.0, hw_decoder_load=load)
        sides = np.full(len(encoded), SIZE)
        batch = [np.frombuffer(each, np.uint8) for each in encoded], *dali.eval_arguments(sides, sides, data)
        device_id = device.index if has_gpu else None
        pipeline = dali.eval_pipeline(lambda: batch, data, batch_size=len(encoded), num_threads=2, device_id=device_id)
        for _ in range(20 if has_gpu else 0):
            torch.mm(work, work)
        (decoded,) = pipeline.run()
        return (torch.from_dlpack(decoded.as_tensor()).clone() * 255).round().byte()

    return decode


def compare(decode: Decode, encoded: Sequence[bytes], load: float, repeats: int) -> tuple[int, float]:
    """How many of the repetitions differ from the first one, and the mean difference of the first one from PIL."""
    first = decode(encoded, load)
    differing = sum(not torch.equal(decode(encoded, load), first) for _ in range(repeats - 1))
    by_pil = np.stack([np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in encoded])
    distance = np.abs(first.permute(0, 2, 3, 1).cpu().numpy().astype(float) - by_pil)
    return differing, distance.mean().item()


def judge(found: Mapping[float, tuple[int, float]], images: int, repeats: int, device_type: str) -> Finding:
    """found: by load, as of ``compare``."""
    at = {load: f" at hw_decoder_load={load:g}" if device_type == "cuda" else "" for load in found}
    wrong = {load: f"{count} of {repeats} times other bytes" for load, (count, _) in found.items() if count}
    for load, (_, distance) in found.items():
        if not distance <= ALLOWED[device_type]:  # NaN, too
            wrong.setdefault(load, f"{distance:.2f} of 255 from PIL")
    if wrong:
        says = "; ".join(f"{what}{at[load]}" for load, what in wrong.items())
        if 0.0 in wrong:
            return failed(says, "take another version of nvidia-dali, and report this one")
        return warning(says, "leave data.hw_decoder_load at 0, as it is by default")
    distances = ", ".join(f"{distance:.3f}{at[load]}" for load, (_, distance) in found.items())
    return ok(f"{images} images, {repeats} times the same bytes; mean difference from PIL {distances} of 255")
