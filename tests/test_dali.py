"""The pictures are PIL's and timm's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image
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
