"""The streams: PIL's and timm's pictures, a pure function of seed and position, every evaluation image once."""

import io
import itertools
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, auto_augment
from torchvision import transforms

from cit_scale.config import AugmentConfig, ConfigError, DataConfig, MixingConfig
from cit_scale.data import dali, draws
from cit_scale.data.dali import UndecodableImageError, erase, eval_stream, train_stream
from cit_scale.data.mixing import mix
from cit_scale.data.order import Cursor
from cit_scale.data.sources import ImageFolder, digits
from cit_scale.world import World

CPU = torch.device("cpu")
RECIPE = AugmentConfig()
PLAIN = AugmentConfig(randaugment=None, erase_prob=0.0)
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


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 images in two classes, of several sizes, file formats and colour modes, some turned by EXIF."""
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


@pytest.fixture(scope="module")
def tiny_digits(tmp_path_factory):
    return digits(tmp_path_factory.mktemp("digits"))


def start(source, augment=RECIPE, data=DATA, seed=0, cursor=START, sizes=(16, 16), rank=0, world_size=1):
    world = World(rank, rank, world_size, world_size)
    return train_stream(source, augment, data, seed, cursor, *sizes, world, CPU)


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
        image_size=data.image_size,
        crop_scale=augment.crop_scale,
        crop_ratio=augment.crop_ratio,
        flip_prob=augment.flip_prob,
        randaugment=draws.parse_randaugment(augment.randaugment) if augment.randaugment else None,
        erase_prob=augment.erase_prob,
    )


def pil_crop(image, draw, i, size):
    y, x, height, width = map(int, draw.crop[i])
    image = image.crop((x, y, x + width, y + height)).resize((size, size), Image.Resampling.BICUBIC)
    return ImageOps.mirror(image) if draw.flip[i] else image


def enlarge(image, size):
    """PIL's bicubic resize, but over a repeated border, as DALI's is: PIL cuts its filter off there.

    It shows where a few pixels become many.
    """
    pixels = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="edge")
    box = (4, 4, 4 + image.width, 4 + image.height)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box)


def pil_operation(image, name, argument):
    """timm's operation with a given argument; warps are bilinear, as DALI's are."""
    has_argument = auto_augment.LEVEL_TO_ARG[TIMM_OPERATIONS[name]] is not None
    is_whole = name in ("posterize", "solarize", "solarize_add")
    arguments = [int(argument) if is_whole else float(argument)] if has_argument else []
    operation = auto_augment.NAME_TO_OP[TIMM_OPERATIONS[name]]
    fill = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
    return operation(image, *arguments, fillcolor=fill, resample=Image.Resampling.BILINEAR)


# --- Pictures ---


@pytest.mark.parametrize("size", [32, 100])
def test_decoding_cropping_resizing_and_flipping_agree_with_pil(photos, size):
    data = replace(DATA, image_size=size)
    (batch,) = take(start(photos, PLAIN, data, sizes=(40, 40)), 1)
    samples = batch.samples.numpy()
    draw = redraw(photos, samples, PLAIN, data)
    for i, ours in enumerate(to_bytes(batch.images)):
        expected = np.asarray(pil_crop(upright(photos, samples[i]), draw, i, size))
        assert np.abs(ours - expected).mean() < 0.5, photos.name(samples[i])
    assert batch.images.shape == (40, 3, size, size)
    assert batch.images.dtype == torch.float32
    assert np.array_equal(batch.labels, photos.labels[samples])


def test_images_smaller_than_the_networks_are_enlarged_as_pil_does(tiny_digits):
    (batch,) = take(start(tiny_digits, PLAIN, sizes=(200, 200)), 1)
    samples = batch.samples.numpy()
    draw = redraw(tiny_digits, samples, PLAIN)
    errors = []
    for i, ours in enumerate(to_bytes(batch.images)):
        y, x, height, width = map(int, draw.crop[i])
        expected = enlarge(upright(tiny_digits, samples[i]).crop((x, y, x + width, y + height)), 32)
        expected = ImageOps.mirror(expected) if draw.flip[i] else expected
        errors.append(np.abs(ours - np.asarray(expected)).mean())
    assert np.mean(errors) < 0.5
    assert max(errors) < 1.5  # PIL rounds and clips between the two directions


EXACT, ROUNDED, BILINEAR, OPENCV = 0.01, 0.6, 0.7, 3.0  # mean absolute error of 255


@pytest.mark.filterwarnings("ignore:The external source node")  # that an operation takes no argument
@pytest.mark.parametrize(
    ("name", "arguments", "tolerance"),
    [
        ("auto_contrast", [0], EXACT),
        ("equalize", [0], OPENCV),
        ("invert", [0], EXACT),
        ("rotate", [27, -13], BILINEAR),
        ("posterize", [1, 4], EXACT),
        ("solarize", [26, 128, 256], EXACT),
        ("solarize_add", [99, 110], EXACT),
        ("color", [1.81, 0.19], ROUNDED),
        ("contrast", [1.81, 0.19], ROUNDED),
        ("brightness", [1.81, 0.19], ROUNDED),
        ("sharpness", [1.81, 0.19], ROUNDED),
        ("shear_x", [0.27, -0.1], BILINEAR),
        ("shear_y", [0.27, -0.1], BILINEAR),
        ("translate_x", [0.405, -0.2], BILINEAR),
        ("translate_y", [0.405, -0.2], BILINEAR),
    ],
)
def test_each_randaugment_operation_agrees_with_timms(name, arguments, tolerance):
    size = 160
    images = np.stack([photo(size, size, seed) for seed in range(3)])
    images[0] = images[0] // 2 + 40  # low contrast, so that stretching it shows
    for argument in arguments:
        operations = np.full((1, 3), list(draws.OPERATIONS).index(name))
        given = np.full((1, 3), argument, np.float32)
        (matrices,) = dali.warp_matrices(operations, given, size)

        @pipeline_def(batch_size=3, num_threads=2, device_id=None)
        def apply(inputs):
            return dali.RANDAUGMENT[name](*fn.external_source(lambda: inputs, num_outputs=3, layout=["HWC", "", ""]))

        (ours,) = apply((images, given[0], matrices)).run()
        theirs = np.stack([np.asarray(pil_operation(Image.fromarray(image), name, argument)) for image in images])
        assert np.abs(np.asarray(ours.as_tensor()).astype(int) - theirs).mean() < tolerance, argument


def test_a_channel_of_one_value_is_left_alone_by_auto_contrast():
    flat = np.full((1, 8, 8, 3), 77, np.uint8)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def apply():
        return dali.RANDAUGMENT["auto_contrast"](fn.external_source(source=lambda: flat, layout="HWC"), None, None)

    assert np.array_equal(np.asarray(apply().run()[0].as_tensor()), flat)


def test_the_stream_applies_the_drawn_operations_in_their_order(photos):
    """Against PIL and timm from the encoded bytes on. Without noise to erase; equalize has another formula."""
    augment = replace(RECIPE, erase_prob=0.0, crop_scale=(0.5, 1.0))
    data = replace(DATA, image_size=96)
    batches = take(start(photos, augment, data, sizes=(40, 40)), 2)
    errors = []
    for epoch, batch in enumerate(batches):
        samples = batch.samples.numpy()
        draw = redraw(photos, samples, augment, data, epoch=epoch)
        for i, ours in enumerate(to_bytes(batch.images)):
            names = [list(draws.OPERATIONS)[operation] for operation in draw.operations[:, i] if operation < 15]
            arguments = draw.arguments[draw.operations[:, i] < 15, i]
            if "equalize" in names:
                continue
            image = pil_crop(upright(photos, samples[i]), draw, i, 96)
            for name, argument in zip(names, arguments, strict=True):
                if name == "posterize" and argument == 0:  # Pillow refuses it since version 13
                    image = Image.new("RGB", image.size)
                else:
                    image = pil_operation(image, name, argument)
            errors.append(np.abs(ours - np.asarray(image)).mean())
    assert len(errors) > 60
    assert np.median(errors) < 0.6
    assert max(errors) < 4  # a value that falls on the other side of a threshold moves far


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
    batch = next(eval_stream(photos, data, 40, World(), CPU))
    for sample, ours in zip(batch.samples, to_bytes(batch.images), strict=True):
        expected = transforms.Compose(steps)(upright(photos, int(sample)))
        assert np.abs(ours - np.asarray(expected)).mean() < 0.5, photos.name(int(sample))


def test_evaluation_enlarges_small_images(tiny_digits):
    batch = next(eval_stream(tiny_digits, DATA, 40, World(), CPU))
    for sample, ours in zip(batch.samples, to_bytes(batch.images), strict=True):
        expected = transforms.CenterCrop(32)(enlarge(upright(tiny_digits, int(sample)), round(32 / 0.875)))
        assert np.abs(ours - np.asarray(expected)).mean() < 1


# --- Purity ---


def global_batches(source, first_step, last_step, world_size, micro_batch_size, data, augment):
    """Global batches [first_step, last_step): images and mixed images and targets, as each rank made its part."""
    global_batch_size, seed = 16, 7
    micro_steps = global_batch_size // world_size // micro_batch_size
    cursor = Cursor.at_step(first_step, len(source), global_batch_size)
    steps = [[] for _ in range(first_step, last_step)]
    for rank in range(world_size):
        sizes = global_batch_size, micro_batch_size
        stream = start(source, augment, data, seed, cursor, sizes, rank, world_size)
        for i, batch in enumerate(take(stream, micro_steps * (last_step - first_step))):
            step = i // micro_steps
            mixed = mix(batch, MixingConfig(group_size=4), 10, seed, first_step + step)
            steps[step].append(
                (batch.positions, batch.samples, batch.labels, batch.images, mixed.images, mixed.targets)
            )
    return [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in steps]


@pytest.fixture(scope="module")
def undisturbed(photos):
    """Five global batches on one rank, across two ends of an epoch (40 images, 16 a step)."""
    return global_batches(photos, 0, 5, 1, 16, DATA, replace(RECIPE, repeats=2))


@pytest.mark.parametrize(
    ("first_step", "world_size", "micro_batch_size", "threads", "prefetch"),
    [
        (0, 2, 8, 1, 2),
        (0, 4, 4, 2, 1),
        (0, 1, 4, 3, 4),
        (1, 1, 16, 2, 2),  # resumed in mid-epoch
        (3, 2, 4, 2, 2),  # resumed in mid-epoch on more ranks
        (2, 4, 4, 1, 2),  # resumed at the end of an epoch
    ],
)
def test_the_global_batch_is_the_same_at_any_layout_and_after_any_resume(
    photos, undisturbed, first_step, world_size, micro_batch_size, threads, prefetch
):
    data = replace(DATA, decode_threads=threads, prefetch=prefetch)
    steps = global_batches(photos, first_step, 5, world_size, micro_batch_size, data, replace(RECIPE, repeats=2))
    for ours, expected in zip(steps, undisturbed[first_step:], strict=True):
        assert ours[0].tolist() == list(range(16))
        for part, whole in zip(ours, expected, strict=True):
            assert torch.equal(part, whole)


def test_what_the_purity_test_compares_is_augmented_erased_and_mixed(undisturbed):
    images, mixed = (torch.cat([step[column] for step in undisturbed]) for column in (3, 4))
    assert (images.flatten(1).amin(dim=1) < 0).any()  # noise of random erasing
    assert (images != mixed).flatten(1).any(dim=1).float().mean() > 0.9
    first, second = undisturbed[0][3][:2]
    assert undisturbed[0][1][0] == undisturbed[0][1][1]  # repeats of one sample stand side by side
    assert not torch.equal(first, second)


def test_epochs_and_seeds_augment_an_image_differently(photos):
    seen = {}
    for seed in (0, 1):
        for epoch, batch in enumerate(take(start(photos, PLAIN, seed=seed, sizes=(40, 40)), 2)):
            seen[seed, epoch] = batch.images[batch.samples.argsort()]
    for one, other in itertools.combinations(seen.values(), 2):
        assert (one != other).flatten(1).any(dim=1).float().mean() > 0.9


def test_a_batch_stays_as_it_is_while_the_stream_goes_on(tiny_digits):
    stream = start(tiny_digits)
    batch = next(stream)
    images = batch.images.clone()
    take(stream, 8)
    assert torch.equal(batch.images, images)


# --- Random erasing ---


def test_erasing_fills_the_box_with_normal_noise_and_nothing_else():
    images = torch.full((64, 3, 32, 32), 0.25)
    draw = redraw_erasing(64)
    erase(images, draw)
    noise = []
    for image, (y, x, height, width) in zip(images, draw.erasing, strict=True):
        box = torch.zeros(32, 32, dtype=torch.bool)
        box[y : y + height, x : x + width] = True
        assert torch.equal(image[:, ~box], torch.full_like(image[:, ~box], 0.25))
        mean, std = (torch.tensor(values)[:, None] for values in (dali.IMAGENET_MEAN, dali.IMAGENET_STD))
        noise.append(((image[:, box] - mean) / std).flatten())
    noise = torch.cat(noise)
    assert noise.mean() == pytest.approx(0, abs=5 / np.sqrt(len(noise)))
    assert noise.std() == pytest.approx(1, abs=5 / np.sqrt(2 * len(noise)))
    assert len(noise.unique()) > 0.99 * len(noise)  # per pixel and channel, and no two images alike


def test_erasing_depends_on_the_key_and_not_on_the_neighbours():
    draw = redraw_erasing(8)
    together = torch.zeros(8, 3, 32, 32)
    erase(together, draw)
    for i in range(8):
        alone = torch.zeros(1, 3, 32, 32)
        row = slice(i, i + 1)
        erase(alone, replace(draw, erasing=draw.erasing[row], erasing_key=draw.erasing_key[row]))
        assert torch.equal(alone[0], together[i])


def redraw_erasing(count):
    sizes = np.full(count, 32)
    return draws.draw(
        0,
        0,
        np.arange(count),
        np.zeros(count, int),
        sizes,
        sizes,
        image_size=32,
        crop_scale=(0.08, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        flip_prob=0.5,
        randaugment=None,
        erase_prob=1.0,
    )


# --- Evaluation ---


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 16), (2, 16), (3, 13), (3, 64)])
def test_evaluation_shows_every_image_exactly_once(photos, world_size, batch_size):
    reference = next(eval_stream(photos, DATA, 40, World(), CPU)).images
    seen, lengths = Counter(), set()
    for rank in range(world_size):
        batches = list(eval_stream(photos, DATA, batch_size, World(rank, rank, world_size, world_size), CPU))
        lengths.add((len(batches), *(len(batch.images) for batch in batches)))
        for batch in batches:
            is_shown = batch.positions >= 0
            assert torch.equal(batch.images, reference[batch.samples])  # the padding too is a picture
            assert (batch.samples[is_shown] % world_size == rank).all()
            assert np.array_equal(batch.labels, photos.labels[batch.samples])
            seen.update(batch.samples[is_shown].tolist())
    assert seen == Counter(range(40))
    assert len(lengths) == 1  # every rank: as many batches, all of the same size


def test_the_positions_of_an_evaluation_batch_do_not_repeat_over_ranks(photos):
    batches = [next(eval_stream(photos, DATA, 8, World(rank, rank, 3, 3), CPU)) for rank in range(3)]
    assert sorted(torch.cat([batch.positions for batch in batches]).tolist()) == list(range(24))


# --- Life and death of a stream ---


def test_training_and_evaluation_take_turns(tiny_digits):
    expected = take(start(tiny_digits), 4)
    training = start(tiny_digits)
    for batch in expected:
        assert torch.equal(next(training).images, batch.images)
        next(eval_stream(tiny_digits, DATA, 16, World(), CPU))
    training.close()


def test_closed_and_finished_streams_leave_no_threads(photos):
    def run_both():
        take(start(photos), 2)
        for _ in eval_stream(photos, DATA, 16, World(), CPU):
            pass
        return len(os.listdir("/proc/self/task"))

    before = run_both()
    assert max(run_both() for _ in range(3)) <= before


@pytest.fixture
def some_photos(tmp_path):
    """Eight photos in a folder that a test may spoil."""
    (tmp_path / "set" / "only").mkdir(parents=True)
    for i in range(8):
        Image.fromarray(photo(40, 50, i)).save(tmp_path / "set" / "only" / f"{i}.jpg")
    return ImageFolder(tmp_path / "set", tmp_path / "cache")


@pytest.mark.parametrize("keep", [0, 300], ids=["empty", "cut short"])
def test_an_undecodable_image_is_named(some_photos, keep):
    bad = some_photos.folder / "only" / "5.jpg"
    bad.write_bytes(bad.read_bytes()[:keep])
    with pytest.raises(UndecodableImageError, match=rf"{bad} cannot be decoded; restore it"):
        take(start(some_photos, sizes=(4, 2)), 4)


def test_an_image_that_changed_its_size_is_named(some_photos):
    changed = some_photos.folder / "only" / "5.jpg"
    Image.fromarray(photo(20, 20, 0)).save(changed)
    with pytest.raises(UndecodableImageError, match=rf"{changed} is now 20 x 20 pixels, but was 40 x 50 when"):
        take(start(some_photos, replace(PLAIN, crop_scale=(0.9, 1.0)), sizes=(4, 2)), 4)


def test_a_missing_file_is_named(some_photos):
    missing = some_photos.folder / "only" / "5.jpg"
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=str(missing)):
        take(start(some_photos, sizes=(4, 2)), 4)


def test_mistakes_are_reported_before_the_first_image(photos):
    with pytest.raises(ConfigError, match=r"augment.randaugment='rand-m99': cannot read 'm99'"):
        start(photos, replace(RECIPE, randaugment="rand-m99"))
    with pytest.raises(ValueError, match="do not fill one global batch of 64"):
        start(photos, sizes=(64, 16))
    with pytest.raises(ValueError, match="global_batch_size=20 is not a multiple"):
        start(photos, sizes=(20, 16))
    with pytest.raises(ValueError, match="samples_seen=8 is not a multiple of global_batch_size=16"):
        start(photos, cursor=Cursor(epoch=0, samples_seen=8))


# --- GPU ---


def test_the_gpu_pipelines_come_from_the_same_definition():
    """Built, not run: DALI checks here which operator takes its input from where."""
    options = {"batch_size": 4, "num_threads": 1, "device_id": 0}
    for pipeline in (
        dali._train_pipeline(lambda: None, 32, num_layers=2, **options),
        dali._eval_pipeline(lambda: None, 32, **options),
    ):
        assert pipeline.device_id == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_cpus_images_and_the_same_ones_at_every_layout(photos):
    augment = replace(RECIPE, erase_prob=0.0)
    cuda = torch.device("cuda", 0)
    arguments = photos, augment, DATA, 0, START
    (on_cpu,) = take(train_stream(*arguments, 40, 40, World(), CPU), 1)
    (on_gpu,) = take(train_stream(*arguments, 40, 40, World(), cuda), 1)
    in_parts = take(train_stream(*arguments, 40, 8, World(), cuda), 5)
    assert on_gpu.images.device == on_gpu.labels.device == cuda
    assert torch.equal(torch.cat([batch.images for batch in in_parts]), on_gpu.images)
    assert (on_cpu.images - on_gpu.images.cpu()).abs().flatten(1).mean(dim=1).median() < 2 / 255
