"""The pictures are PIL's and timm's."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image, ImageOps
from stream_cases import (
    CPU,
    DATA,
    PLAIN,
    RECIPE,
    START,
    photo,
    pil_crop,
    pil_operation,
    redraw,
    start,
    take,
    to_bytes,
    upright,
)
from torch.utils import dlpack
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

from cit_scale.data import dali, draws
from cit_scale.data.reader import Reader
from cit_scale.data.stream import eval_stream, train_stream
from cit_scale.distributed.world import World

# --- Pictures ---


@pytest.mark.parametrize("size", [32, 100])
def test_decoding_cropping_resizing_and_flipping_agree_with_pil(photos, size):
    data = replace(DATA, image_size=size)
    (batch,) = take(start(photos, PLAIN, data, sizes=(40, 40)), 1)
    samples = batch.samples.numpy()
    draw = redraw(photos, samples, PLAIN, data)
    for i, ours in enumerate(to_bytes(batch.images)):
        expected = np.asarray(pil_crop(upright(photos, samples[i]), draw, i, size))
        assert np.abs(ours - expected).mean() < 0.4, photos.name(samples[i])
    assert batch.images.shape == (40, 3, size, size)
    assert batch.images.dtype == torch.float32
    assert np.array_equal(batch.labels, photos.labels[samples])


def test_images_smaller_than_the_networks_are_enlarged_as_pil_does(tiny_digits):
    (batch,) = take(start(tiny_digits, PLAIN, sizes=(200, 200)), 1)
    samples = batch.samples.numpy()
    draw = redraw(tiny_digits, samples, PLAIN)
    for i, ours in enumerate(to_bytes(batch.images)):
        expected = pil_crop(upright(tiny_digits, samples[i]), draw, i, 32)
        assert np.abs(ours - np.asarray(expected)).mean() < 0.1


EXACT, CUT, ROUNDED, BILINEAR, BOXES = 0.01, 0.05, 0.6, 0.7, 1.0  # mean absolute error of 255


@pytest.mark.filterwarnings("ignore:The external source node")  # that an operation takes no argument
@pytest.mark.parametrize(
    ("name", "arguments", "tolerance"),
    [
        ("auto_contrast", [0], EXACT),
        ("equalize", [0], EXACT),
        ("invert", [0], EXACT),
        ("rotate", [27, -13], BILINEAR),
        ("posterize", [1, 4], EXACT),
        ("solarize", [26, 128, 256], EXACT),
        ("solarize_add", [99, 110], EXACT),
        ("color", [1.81, 0.19], CUT),
        ("contrast", [1.81, 0.19], CUT),
        ("brightness", [1.81, 0.19], CUT),
        ("sharpness", [1.81, 0.19], ROUNDED),
        ("shear_x", [0.27, -0.1], BILINEAR),
        ("shear_y", [0.27, -0.1], BILINEAR),
        ("translate_x", [0.405, -0.2], BILINEAR),
        ("translate_y", [0.405, -0.2], BILINEAR),
        ("gaussian_blur", [0.1, 0.7, 2.0], BOXES),
    ],
)
def test_each_operation_agrees_with_timms(name, arguments, tolerance):
    size = 160
    images = np.stack([photo(size, size, seed) for seed in range(3)])
    images[0] = images[0] // 2 + 40  # low contrast, so that stretching it shows
    for argument in arguments:
        operations = np.full((1, 3), draws.NAMES.index(name))
        given = np.full((1, 3), argument, np.float32)
        (matrices,) = dali.warp_matrices(operations, given, np.zeros(3, bool), size)

        @pipeline_def(batch_size=3, num_threads=2, device_id=None)
        def apply(inputs):
            return dali.COMPUTED_BY[name](*fn.external_source(lambda: inputs, num_outputs=3, layout=["HWC", "", ""]))

        (ours,) = apply((images, given[0], matrices)).run()
        theirs = np.stack([np.asarray(pil_operation(Image.fromarray(image), name, argument)) for image in images])
        assert np.abs(np.asarray(ours.as_tensor()).astype(int) - theirs).mean() < tolerance, argument


def test_a_channel_of_one_value_is_left_alone_by_auto_contrast():
    flat = np.full((1, 8, 8, 3), 77, np.uint8)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def apply():
        return dali.COMPUTED_BY["auto_contrast"](fn.external_source(source=lambda: flat, layout="HWC"), None, None)

    assert np.array_equal(np.asarray(apply().run()[0].as_tensor()), flat)


def pictures_to_equalize(size):
    """Of one value, of two, dark, of all values, and with the channels swapped: (5, size, size, 3) uint8."""
    flat = np.full((size, size, 3), 77, np.uint8)
    halves = flat.copy()
    halves[: size // 2] = (0, 255, 78)
    some = photo(size, size, 1)
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return torch.from_numpy(np.stack([flat, halves, some // 4, noise, some[..., ::-1]]))


@pytest.mark.parametrize("size", [1, 2, 16, 33, 224])
def test_images_are_equalized_as_pil_does_bit_for_bit_alone_and_together(size):
    images = pictures_to_equalize(size)
    together = dali.equalize_together(images)
    for image, ours in zip(images, together, strict=True):
        theirs = np.asarray(ImageOps.equalize(Image.fromarray(image.numpy())))
        assert np.array_equal(dali.equalize(image), theirs)
        assert np.array_equal(ours, theirs)
    assert together.dtype == torch.uint8
    assert together.is_contiguous()


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m5-n3-p0.9-inc0", "3a"])
def test_the_stream_applies_the_drawn_operations_in_their_order(photos, policy):
    """Against PIL and timm from the encoded bytes on, without noise to erase."""
    augment = replace(RECIPE, erase_prob=0.0, crop_scale=(0.5, 1.0), policy=policy)
    data = replace(DATA, image_size=96)
    batches = take(start(photos, augment, data, sizes=(40, 40)), 2)
    errors = []
    for epoch, batch in enumerate(batches):
        samples = batch.samples.numpy()
        draw = redraw(photos, samples, augment, data, epoch=epoch)
        for i, ours in enumerate(to_bytes(batch.images)):
            image = pil_crop(upright(photos, samples[i]), draw, i, 96)
            for operation, argument in zip(draw.operations[:, i], draw.arguments[:, i], strict=True):
                image = pil_operation(image, draws.NAMES[operation], argument)
            errors.append(np.abs(ours - np.asarray(image)).mean())
    assert len(errors) == 80
    assert np.median(errors) < 0.8
    assert max(errors) < 6  # a value that falls on the other side of a threshold moves far


def test_the_order_of_two_layers_shows(photos):
    """The oracle above sees an exchange of the layers only if the draws hold pairs that do not commute."""
    augment = replace(RECIPE, erase_prob=0.0)
    draw = redraw(photos, np.arange(40), augment)
    names = list(draws.OPERATIONS)
    pairs = {(names[a], names[b]) for a, b in draw.operations.T if a < 15 and b < 15}
    assert any(a != b and {a, b} & {"solarize", "posterize", "solarize_add", "contrast"} for a, b in pairs)


def test_evaluation_images_agree_with_torchvisions(photos):
    data = replace(DATA, image_size=48)
    steps = [transforms.Resize(round(48 / 0.875), transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(48)]
    batch = next(eval_stream(Reader(photos), data, 40, World(), CPU))
    for sample, ours in zip(batch.samples, to_bytes(batch.images), strict=True):
        expected = transforms.Compose(steps)(upright(photos, int(sample)))
        assert np.abs(ours - np.asarray(expected)).mean() < 0.4, photos.name(int(sample))


def test_evaluation_enlarges_small_images(tiny_digits):
    batch = next(eval_stream(Reader(tiny_digits), DATA, 40, World(), CPU))
    steps = [transforms.Resize(round(32 / 0.875), transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32)]
    for sample, ours in zip(batch.samples, to_bytes(batch.images), strict=True):
        expected = transforms.Compose(steps)(upright(tiny_digits, int(sample)))
        assert np.abs(ours - np.asarray(expected)).mean() < 0.1


@pytest.mark.parametrize("order", ["C", "F"])
def test_only_the_images_that_dali_refuses_are_named(photos, order):
    """Whatever the order of the crops in memory: draws have theirs by columns."""
    encoded = [np.frombuffer(photos.read(sample), np.uint8) for sample in (4, 5, 6)]
    encoded[1] = encoded[1][:300]
    crops = np.array([[1, 2, 30, 20]] * 3, np.int32, order=order)
    assert dali.undecodable(encoded, crops) == [1]


# --- GPU ---


def test_the_gpu_pipelines_come_from_the_same_definition():
    """Built, not run: DALI checks here which operator takes its input from where."""
    options = {"batch_size": 4, "num_threads": 1, "device_id": 0}
    for pipeline in (
        dali.train_pipeline(lambda: None, DATA, num_layers=2, **options),
        dali.eval_pipeline(lambda: None, DATA, **options),
    ):
        assert pipeline.device_id == 0


class Operators(TorchDispatchMode):
    """Counts torch's operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


# What waits for a GPU, because it reads a number or a size from it.
READS = {"_local_scalar_dense", "item", "bincount", "nonzero", "unique", "masked_select", "is_nonzero", "equal"}


@pytest.fixture
def dalis_stream(monkeypatch):
    """Stands in for DALI's stream on a CPU. Returns what happens: names of streams that are entered and left."""
    happened = []

    @contextmanager
    def on(stream):
        happened.append(f"onto {stream}")
        yield
        happened.append(f"off {stream}")

    def refuse(*args):
        raise AssertionError("waits for the GPU")

    monkeypatch.setattr(dali.python_function_plugin, "current_dali_stream", lambda: 1234)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: f"{pointer} of {device}")
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    monkeypatch.setattr(torch.cuda, "current_stream", refuse)
    return happened


def test_the_images_of_a_gpus_sub_batch_are_equalized_at_once_on_dalis_stream(dalis_stream):
    images = pictures_to_equalize(32)
    counts = {}
    for number in (1, 3, 5):
        capsules = [dlpack.to_dlpack(image) for image in images[:number]]

        def equalize(batch):
            dalis_stream.append(f"equalizes {len(batch)}")
            return dali.equalize_together(batch)

        with Operators() as operators:
            results = dali._Together(equalize, device_id=3)(capsules)
        assert dalis_stream == ["onto 1234 of cuda:3", f"equalizes {number}", "off 1234 of cuda:3"]
        dalis_stream.clear()
        for image, result in zip(images[:number], results, strict=True):
            assert torch.equal(dlpack.from_dlpack(result), dali.equalize(image))
        counts[number] = operators.counts
    assert counts[1] == counts[3] == counts[5]  # independent of the number of images
    assert counts[1]["scatter_add_"] == counts[1]["stack"] == 1
    assert sum(counts[1].values()) < 40
    assert not READS & counts[1].keys()
    assert dali._Together(dali.equalize_together, device_id=0)([]) == []


def test_equalizing_together_reads_nothing_from_the_device():
    """On the meta device there is nothing to read."""
    images = torch.empty(3, 8, 8, 3, dtype=torch.uint8, device="meta")
    assert dali.equalize_together(images).shape == images.shape
    with pytest.raises(RuntimeError):
        dali.equalize(images[0])


def test_images_of_several_sizes_are_a_mistake_of_ours(dalis_stream):
    images = torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(4, 5, 3, dtype=torch.uint8)
    with pytest.raises(AssertionError):
        dali._Together(dali.equalize_together, 0)([dlpack.to_dlpack(image) for image in images])


def test_only_a_gpu_pipeline_equalizes_on_dalis_stream_and_interpolates_chroma(monkeypatch):
    called, decoded = [], []
    function, decode = fn.dl_tensor_python_function, fn.decoders.image_slice
    monkeypatch.setattr(
        fn, "dl_tensor_python_function", lambda *args, **options: called.append(options) or function(*args, **options)
    )
    monkeypatch.setattr(
        fn.decoders, "image_slice", lambda *args, **options: decoded.append(options) or decode(*args, **options)
    )
    for device_id in (0, None):
        dali.train_pipeline(lambda: None, DATA, num_layers=1, batch_size=4, num_threads=1, device_id=device_id)
    on_gpu, *on_cpu = called
    assert isinstance(on_gpu["function"], dali._Together)
    assert on_gpu["synchronize_stream"] is False
    assert on_gpu["device"] == "gpu"
    assert [options["function"]._function for options in on_cpu] == [dali.resize, dali.equalize]
    assert all("synchronize_stream" not in options and options["device"] == "cpu" for options in on_cpu)
    assert decoded[0]["device"] == "mixed"
    assert decoded[0]["jpeg_fancy_upsampling"] is True
    assert decoded[0]["hw_decoder_load"] == 0
    assert not {"jpeg_fancy_upsampling", "hw_decoder_load"} & decoded[1].keys()


def test_pinned_memory_is_reserved_once_a_process(monkeypatch):
    reserved = []
    monkeypatch.setattr(dali, "PreallocatePinnedMemory", reserved.append)
    dali.reserve_pinned_memory.cache_clear()
    for _ in range(3):
        dali.reserve_pinned_memory(5)
    dali.reserve_pinned_memory.cache_clear()
    assert reserved == [5 << 20]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_equalizes_as_pil_does_while_torchs_own_stream_is_busy():
    """On DALI's stream: what is queued on torch's default stream, here half a second of waiting, is not waited for."""
    images = pictures_to_equalize(64).numpy()

    @pipeline_def(batch_size=5, num_threads=1, device_id=0)
    def apply():
        read = fn.external_source(source=lambda: images, layout="HWC")
        return dali.COMPUTED_BY["equalize"](read.gpu(), None, None)

    pipeline = apply()
    expected = np.stack([ImageOps.equalize(Image.fromarray(image)) for image in images])
    for _ in range(3):  # the first one initialises
        waited_for = torch.cuda.Event()
        torch.cuda._sleep(1_000_000_000)
        waited_for.record()
        (ours,) = pipeline.run()  # returns when the images are there
        is_still_waiting = not waited_for.query()
        result = np.asarray(ours.as_cpu().as_tensor())
        torch.cuda.synchronize()
        assert np.array_equal(result, expected)
    assert is_still_waiting


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_cpus_images_and_the_same_ones_at_every_layout(photos):
    augment = replace(RECIPE, erase_prob=0.0)
    cuda = torch.device("cuda", 0)
    arguments = Reader(photos), augment, DATA, 0, START
    (on_cpu,) = take(train_stream(*arguments, 40, 40, World(), CPU), 1)
    (on_gpu,) = take(train_stream(*arguments, 40, 40, World(), cuda), 1)
    in_parts = take(train_stream(*arguments, 40, 8, World(), cuda), 5)
    assert on_gpu.images.device == on_gpu.labels.device == cuda
    assert torch.equal(torch.cat([batch.images for batch in in_parts]), on_gpu.images)
    assert (on_cpu.images - on_gpu.images.cpu()).abs().flatten(1).mean(dim=1).median() < 2 / 255
