"""The streams: a pure function of seed and position, every evaluation image once, bad images replaced."""

import errno
import itertools
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import counting
from PIL import Image
from stream_cases import (
    CPU,
    DATA,
    PLAIN,
    RECIPE,
    photo,
    start,
    take,
    to_bytes,
    upright,
)
from torchvision import transforms

from cit_scale.config import AugmentConfig, DataConfig, MixingConfig
from cit_scale.data import dali, draws, stream
from cit_scale.data.erasing import IMAGENET_MEAN, IMAGENET_STD, draw_noise, erase_on_device, write_noise
from cit_scale.data.mixing import mix
from cit_scale.data.order import Cursor
from cit_scale.data.reader import ByteGate, Reader
from cit_scale.data.stream import eval_stream, with_threads
from cit_scale.datasets.pack import pack
from cit_scale.datasets.shards import TarShards
from cit_scale.datasets.sources import ImageFolder
from cit_scale.distributed.world import World
from cit_scale.errors import BadImageError, ConfigError

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
            mixed = mix(batch, MixingConfig(group_size=2), 10, seed, first_step + step)
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
        (0, 8, 2, 1, 2),
        (0, 1, 4, 3, 4),
        (0, 1, 16, 1, 0),  # nothing is prepared ahead
        (0, 1, 16, 8, 3),
        (1, 1, 16, 2, 2),  # resumed in mid-epoch
        (2, 4, 4, 1, 2),  # at the end of an epoch
        (3, 2, 4, 2, 0),
        (4, 8, 2, 2, 1),
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


def test_shards_give_the_folders_batches(photos, undisturbed, tmp_path):
    pack(photos, tmp_path / "shards", workers=2)
    steps = global_batches(TarShards(tmp_path / "shards"), 0, 5, 2, 8, DATA, replace(RECIPE, repeats=2))
    for ours, expected in zip(steps, undisturbed, strict=True):
        assert all(torch.equal(part, whole) for part, whole in zip(ours, expected, strict=True))


def test_what_the_purity_test_compares_is_augmented_erased_and_mixed(undisturbed):
    images, mixed = (torch.cat([step[column] for step in undisturbed]) for column in (3, 4))
    assert (images.flatten(1).amin(dim=1) < 0).any()  # noise of random erasing
    assert (images != mixed).flatten(1).any(dim=1).float().mean() > 0.9
    epoch = slice(0, 2)  # 40 images in runs of 20, twice
    samples, pictures = (torch.cat([step[column] for step in undisturbed[epoch]]) for column in (1, 3))
    assert torch.equal(samples[:12], samples[20:])
    assert not (pictures[:12] == pictures[20:]).flatten(1).all(dim=1).any()  # each time augmented anew


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


def test_a_gpus_rank_takes_its_share_of_the_cores(monkeypatch):
    for cores, local_ranks, expected in ((2, 1, 4), (8, 1, 8), (16, 2, 8), (128, 8, 12), (64, 8, 8)):
        monkeypatch.setattr(stream.os, "sched_getaffinity", lambda pid, cores=cores: range(cores))
        world = World(0, 0, local_ranks, local_ranks)
        assert with_threads(DataConfig(), world, torch.device("cuda")).decode_threads == expected
        assert with_threads(DataConfig(), world, CPU).decode_threads == 4
        assert with_threads(DataConfig(decode_threads=3), world, torch.device("cuda")).decode_threads == 3


# --- Random erasing ---


def test_erasing_fills_the_box_with_normal_noise_and_nothing_else():
    images = torch.full((64, 3, 32, 32), 0.25)
    draw = redraw_erasing(64)
    write_noise(images, draw_noise(draw, 32, pinned=False))
    noise = []
    for image, (y, x, height, width) in zip(images, draw.erasing, strict=True):
        box = torch.zeros(32, 32, dtype=torch.bool)
        box[y : y + height, x : x + width] = True
        assert torch.equal(image[:, ~box], torch.full_like(image[:, ~box], 0.25))
        mean, std = (torch.tensor(values)[:, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        noise.append(((image[:, box] - mean) / std).flatten())
    noise = torch.cat(noise)
    assert noise.mean() == pytest.approx(0, abs=5 / np.sqrt(len(noise)))
    assert noise.std() == pytest.approx(1, abs=5 / np.sqrt(2 * len(noise)))
    assert len(noise.unique()) > 0.99 * len(noise)  # per pixel and channel, and no two images alike


def test_erasing_depends_on_the_key_and_not_on_the_neighbours():
    draw = redraw_erasing(8)
    together = torch.zeros(8, 3, 32, 32)
    write_noise(together, draw_noise(draw, 32, pinned=False))
    for i in range(8):
        alone = torch.zeros(1, 3, 32, 32)
        row = slice(i, i + 1)
        drawn = replace(draw, erasing=draw.erasing[row], erasing_key=draw.erasing_key[row])
        write_noise(alone, draw_noise(drawn, 32, pinned=False))
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("size", [7, 32, 97, 224])
def test_on_a_cpu_both_versions_of_erasing_are_the_same_bit_for_bit(size):
    draw = redraw_erasing(24, size)
    one, other = (torch.rand(24, 3, size, size, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    erase_on_device(one, draw)
    write_noise(other, draw_noise(draw, size, pinned=False))
    assert one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize("count", [1, 30])
def test_erasing_is_one_launch_for_any_number_of_images(count):
    noise, images = draw_noise(redraw_erasing(count), 32, pinned=False), torch.zeros(count, 3, 32, 32)
    with counting() as operators:
        write_noise(images, noise)
    assert operators.counts == {"view": 1, "scatter_": 1}
    assert not operators.reads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_noise_of_the_cpu():
    draw = redraw_erasing(64)
    on_cpu, on_gpu = torch.zeros(64, 3, 32, 32), torch.zeros(64, 3, 32, 32, device="cuda")
    write_noise(on_cpu, draw_noise(draw, 32, pinned=False))
    write_noise(on_gpu, draw_noise(draw, 32, pinned=True))
    assert torch.equal(on_gpu.cpu(), on_cpu)


def redraw_erasing(count, size=32):
    sizes = np.full(count, size)
    return draws.draw(
        0,
        0,
        np.arange(count),
        np.zeros(count, int),
        sizes,
        sizes,
        AugmentConfig(policy=None, erase_prob=1.0),
        size,
    )


# --- Evaluation ---


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 16), (2, 16), (3, 13), (3, 64)])
def test_evaluation_shows_every_image_exactly_once(photos, world_size, batch_size):
    reference = next(eval_stream(Reader(photos), DATA, 40, World(), CPU)).images
    seen, lengths = Counter(), set()
    for rank in range(world_size):
        batches = list(eval_stream(Reader(photos), DATA, batch_size, World(rank, rank, world_size, world_size), CPU))
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
    batches = [next(eval_stream(Reader(photos), DATA, 8, World(rank, rank, 3, 3), CPU)) for rank in range(3)]
    assert sorted(torch.cat([batch.positions for batch in batches]).tolist()) == list(range(24))


# --- Life and death of a stream ---


def test_training_and_evaluation_take_turns(tiny_digits):
    expected = take(start(tiny_digits), 4)
    training = start(tiny_digits)
    for batch in expected:
        assert torch.equal(next(training).images, batch.images)
        next(eval_stream(Reader(tiny_digits), DATA, 16, World(), CPU))
    training.close()


def test_closed_and_finished_streams_leave_no_threads(photos):
    def run_both():
        take(start(photos), 2)
        for _ in eval_stream(Reader(photos), DATA, 16, World(), CPU):
            pass
        return len(os.listdir("/proc/self/task"))

    # A leak grows with every run. One that grew once is a pool elsewhere that began, or a thread just joined that the
    # system still lists.
    counts = [run_both() for _ in range(4)]
    assert any(after <= before for before, after in itertools.pairwise(counts)), counts


@pytest.fixture
def some_photos(tmp_path):
    """Eight photos in a folder that a test may spoil."""
    (tmp_path / "set" / "only").mkdir(parents=True)
    for i in range(8):
        Image.fromarray(photo(40, 50, i)).save(tmp_path / "set" / "only" / f"{i}.jpg")
    return ImageFolder(tmp_path / "set", tmp_path / "cache")


BAD_BYTES = {
    "zero bytes": lambda good: b"",
    "cut short": lambda good: good[: len(good) // 2],
    "no end": lambda good: good[:-2],
    "a broken table": lambda good: good[: (at := good.index(b"\xff\xc4") + 5)] + b"\xff" * 16 + good[at + 16 :],
    "no table": lambda good: good[:160] + bytes(300) + good[460:],
    "text": lambda good: b"not an image at all, but long enough to be one" * 20,
    "a broken PNG": lambda good: b"\x89PNG\r\n\x1a\n" + good[8:] + b"IEND\xaeB`\x82",
}


def spoil(source, sample, how):
    """Break an image after it was indexed."""
    path = Path(source.name(sample))
    path.write_bytes(BAD_BYTES[how](path.read_bytes()))


@pytest.mark.parametrize("how", BAD_BYTES)
def test_an_image_that_breaks_is_named_and_the_next_one_stands_in_for_it(some_photos, how):
    before = take(start(some_photos, PLAIN, sizes=(4, 2)), 12)
    spoil(some_photos, 5, how)
    reader = Reader(some_photos)
    after = take(start(reader, PLAIN, sizes=(4, 2)), 12)
    assert list(reader.bad) == [5]
    (line,) = reader.bad_image_lines(reader.bad)
    assert line.startswith(f"{some_photos.name(5)}\t")
    assert "\n" not in line
    for one, other in zip(before, after, strict=True):
        replaced = one.samples == 5
        assert torch.equal(other.samples, torch.where(replaced, 6, one.samples))
        assert torch.equal(other.images[~replaced], one.images[~replaced])
        assert np.array_equal(other.labels, some_photos.labels[other.samples])
    assert any((batch.samples == 5).any() for batch in before)


def test_the_bad_images_are_replaced_alike_at_every_layout(photos, tmp_path):
    """All kinds of bad images, in neighbours too, met in different orders by different ranks."""
    shutil.copytree(photos.folder, tmp_path / "set")
    source = ImageFolder(tmp_path / "set", tmp_path / "cache")
    for sample, how in zip((3, 4, 5, 11, 30, 39, 20), BAD_BYTES, strict=True):
        spoil(source, sample, how)
    whole = global_batches(source, 0, 4, 1, 16, DATA, RECIPE)
    for first_step, world_size, micro_batch_size, prefetch in ((0, 2, 8, 2), (0, 4, 4, 0), (2, 2, 4, 3)):
        data = replace(DATA, prefetch=prefetch)
        parts = global_batches(source, first_step, 4, world_size, micro_batch_size, data, RECIPE)
        for ours, expected in zip(parts, whole[first_step:], strict=True):
            assert all(torch.equal(part, all_of_it) for part, all_of_it in zip(ours, expected, strict=True))


def test_a_doubt_about_an_image_is_forgotten_with_its_batch(some_photos):
    """Or a process that has seen more would choose otherwise than a resumed one, or than another rank."""
    spoil(some_photos, 5, "a broken table")
    reader = Reader(some_photos)
    assert reader.read(5)[0] == 5  # it looks whole
    assert reader.read(5, {5})[0] == 6
    assert reader.read(5)[0] == 5
    spoil(some_photos, 5, "no end")
    assert reader.read(5)[0] == 6
    assert list(reader.bad) == [5]


def test_an_image_that_changed_its_size_is_named_and_replaced(some_photos):
    changed = Path(some_photos.name(5))
    Image.fromarray(photo(20, 20, 0)).save(changed)
    reader = Reader(some_photos)
    take(start(reader, replace(PLAIN, crop_scale=(0.9, 1.0)), sizes=(4, 2)), 4)
    assert reader.bad_image_lines(reader.bad) == [f"{changed}\tis now 20 x 20 pixels, but was 40 x 50 when indexed"]


def test_a_missing_file_is_named_and_replaced(some_photos):
    missing = Path(some_photos.name(5))
    missing.unlink()
    reader = Reader(some_photos)
    take(start(reader, sizes=(4, 2)), 4)
    assert reader.bad_image_lines(reader.bad) == [f"{missing}\tNo such file or directory"]


def test_an_image_too_thin_to_be_enlarged_is_named_and_replaced(tmp_path):
    folder = tmp_path / "set" / "only"
    folder.mkdir(parents=True)
    for name, size in {"a.png": (1, 20_000), "b.png": (1, 900), "c.png": (50, 40)}.items():
        Image.new("RGB", size).save(folder / name)
    source = ImageFolder(tmp_path / "set", tmp_path / "cache")
    assert source.rejects == {0: "1 x 20000 pixels: one side is more than 1000 times the other"}
    (batch,) = eval_stream(Reader(source), DATA, 3, World(), CPU)
    assert batch.samples.tolist() == [1, 1, 2]
    assert batch.positions.tolist() == [-1, 1, 2]


def test_a_forked_process_has_threads_of_its_own(tiny_digits):
    expected = take(start(tiny_digits, PLAIN), 1)[0].images
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def resize_there():
        image = torch.arange(48, dtype=torch.uint8).reshape(4, 4, 3)
        resized = dali._pool(DATA.decode_threads).submit(dali.resize, image, torch.tensor([8, 8])).result(timeout=20)
        sender.send(resized.shape)

    child = fork.Process(target=resize_there)
    child.start()
    assert receiver.poll(30)
    assert tuple(receiver.recv()) == (8, 8, 3)
    child.join()
    assert torch.equal(take(start(tiny_digits, PLAIN), 1)[0].images, expected)


def test_a_mistake_in_planning_ends_the_stream_with_itself(some_photos, monkeypatch):
    spoil(some_photos, 5, "a broken table")
    planned = itertools.count()
    draw = draws.draw

    def fail_later(*args, **options):
        if next(planned) == 3:
            raise RuntimeError("a mistake of ours")
        return draw(*args, **options)

    monkeypatch.setattr(draws, "draw", fail_later)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        take(start(some_photos, PLAIN, sizes=(8, 8)), 8)


def refusing(is_refused, message="nvJPEG refuses"):
    """A GPU's pipeline on a CPU: the real one, but for a decoder that refuses some encoded images.

    is_refused: tells of an image's bytes. Returns the pipeline's constructor and a list with an item for each.
    """
    started = []

    def pipeline(feed, device_id, **options):
        fed = deque()

        def watched():
            inputs = feed()
            fed.append(inputs[0])
            return inputs

        real = dali.train_pipeline(watched, num_layers=0, device_id=None, **options)

        class Refusing:
            def run(self, cuda_stream=None):
                outputs = real.run()
                if any(is_refused(image.tobytes()) for image in fed.popleft()):
                    raise RuntimeError(message)
                return outputs

        started.append(device_id)
        return Refusing()

    return pipeline, started


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """``as_on_a_gpu(reader, pipeline)``: batches of 4 of ``some_photos`` as on a GPU, all of whose work a CPU does."""

    def batches(reader, pipeline, device_id=0):
        every_sample = itertools.cycle([np.arange(4), np.arange(4, 8)])
        requests = (stream.BatchRequest(0, np.arange(4), samples, 0 * samples) for samples in every_sample)
        plan = partial(
            stream.plan_training,
            reader=reader,
            augment=PLAIN,
            seed=0,
            size=DATA.image_size,
            draw_erasing=lambda draw: draw_noise(draw, DATA.image_size, pinned=False),
        )
        made = stream.BatchStream(reader, requests, plan, pipeline, DATA, 4, CPU)
        made._device_id = device_id
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device_id: "torch's stream")
        return made

    return batches


def is_jpeg_of(source, sample):
    data = source.read(sample)
    return lambda encoded: encoded == data


def test_a_batch_with_an_image_that_only_a_gpu_refuses_goes_to_pil(some_photos, as_on_a_gpu, capfd):
    accepting, _ = refusing(lambda encoded: False)
    pipeline, started = refusing(is_jpeg_of(some_photos, 5))
    reader = Reader(some_photos)
    expected, ours = as_on_a_gpu(reader, accepting), as_on_a_gpu(reader, pipeline)
    with closing(expected), closing(ours):
        for _ in range(8):
            one, other = expected.next_batch(), ours.next_batch()
            assert torch.equal(one.images, other.images)  # libjpeg's pixels, in PIL as in DALI
            assert torch.equal(one.samples, other.samples)
    assert 2 <= len(started) <= 1 + 4  # the image is in every second batch, and several are in flight
    assert reader.bad == {}
    assert capfd.readouterr().err.count("PIL decodes them: nvJPEG refuses") == 1


def test_on_a_cpu_an_error_that_is_no_image_ends_the_stream_at_once(some_photos, as_on_a_gpu):
    pipeline, started = refusing(is_jpeg_of(some_photos, 5))
    ours = as_on_a_gpu(Reader(some_photos), pipeline, device_id=None)
    with closing(ours):
        assert ours.next_batch() is not None
        with pytest.raises(RuntimeError, match="nvJPEG refuses"):
            ours.next_batch()
    assert len(started) == 1


def test_an_error_that_is_no_image_ends_the_stream_with_itself_after_one_attempt_with_pil(some_photos, as_on_a_gpu):
    pipeline, started = refusing(lambda encoded: True, "CUDA runtime API error (2): out of memory")
    reader = Reader(some_photos)
    ours = as_on_a_gpu(reader, pipeline)
    with closing(ours), pytest.raises(RuntimeError, match="out of memory"):
        ours.next_batch()
    assert len(started) <= 3
    assert reader.bad == {}


def test_images_that_a_gpu_refuses_and_pil_too_are_replaced(some_photos, as_on_a_gpu):
    """The image that stands in is read anew: the GPU refuses that one as well, and PIL decodes it."""
    spoil(some_photos, 5, "a broken table")
    refused = [is_jpeg_of(some_photos, 5), is_jpeg_of(some_photos, 6)]
    pipeline, _ = refusing(lambda encoded: any(test(encoded) for test in refused))
    reader = Reader(some_photos)
    ours = as_on_a_gpu(reader, pipeline)
    with closing(ours):
        samples = [ours.next_batch().samples.tolist() for _ in range(4)]
    assert samples == [[0, 1, 2, 3], [4, 6, 6, 7]] * 2
    assert list(reader.bad) == [5]


def test_a_disk_that_fails_is_no_bad_image(some_photos, monkeypatch):
    def read(sample):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(some_photos, "read", read)
    with pytest.raises(OSError, match="Input/output error"):
        take(start(some_photos, sizes=(4, 2)), 1)


def test_a_data_set_without_a_good_image_is_refused(some_photos):
    for sample in range(8):
        spoil(some_photos, sample, "zero bytes")
    with pytest.raises(BadImageError, match=r"none of 8 images can be decoded; the last: .*\d.jpg\tnot an image"):
        take(start(some_photos, sizes=(4, 2)), 1)


def odd_images(folder):
    """Images that PIL decodes and DALI does not, or otherwise; and ordinary ones of rare kinds."""
    rgb = Image.fromarray(photo(40, 50, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "animated.gif": (rgb, {}),
        "avif.avif": (rgb, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "deep.png": (Image.fromarray((np.arange(2000).reshape(40, 50) * 31).astype(np.uint16)), {}),
        "float.tif": (rgb.convert("F"), {}),
        "palette.png": (rgb.convert("P"), {"transparency": 3}),
        "rotated.jpg": (rgb, {"exif": exif}),
        "rotated.png": (rgb, {"exif": exif}),
        "thin.jpg": (rgb.resize((1, 40)), {}),
        "tiff_cmyk.tif": (rgb.convert("CMYK"), {}),
        "two_colours.png": (rgb.convert("1"), {}),
        "with_alpha.webp": (rgb.convert("RGBA"), {"lossless": True}),
    }
    folder.mkdir(parents=True)
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
    jpeg = (folder / "rotated.jpg").read_bytes()
    (folder / "trailing.jpg").write_bytes(jpeg + b"left by a camera" * 10)
    png = (folder / "rotated.png").read_bytes()
    (folder / "without_end.png").write_bytes(png[:-12])
    return len(kinds) + 2


def test_odd_images_are_decoded_as_pil_decodes_them(tmp_path):
    count = odd_images(tmp_path / "set" / "only")
    source = ImageFolder(tmp_path / "set", tmp_path / "cache")
    reader = Reader(source)
    data = replace(DATA, image_size=40, crop_ratio=1.0)
    (batch,) = eval_stream(reader, data, count, World(), CPU)
    assert reader.bad == {}
    assert batch.positions.tolist() == list(range(count))
    steps = [transforms.Resize(40, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(40)]
    for sample, ours in zip(batch.samples, to_bytes(batch.images), strict=True):
        expected = np.asarray(transforms.Compose(steps)(upright(source, int(sample))))
        assert np.abs(ours - expected).mean() < 0.1, source.name(int(sample))


@pytest.mark.parametrize(("sample", "how"), [(5, "cut short"), (7, "a broken table"), (0, "a broken table")])
def test_a_bad_evaluation_image_does_not_count(some_photos, sample, how):
    spoil(some_photos, sample, how)
    seen = []
    for rank in range(2):
        reader = Reader(some_photos)
        for batch in eval_stream(reader, DATA, 3, World(rank, rank, 2, 2), CPU):
            seen += batch.samples[batch.positions >= 0].tolist()
    assert sorted(seen) == [image for image in range(8) if image != sample]


def test_mistakes_are_reported_before_the_first_image(photos):
    with pytest.raises(ConfigError, match=r"augment.policy='rand-m99': cannot read 'm99'"):
        start(photos, replace(RECIPE, policy="rand-m99"))
    with pytest.raises(ValueError, match="do not fill one global batch of 64"):
        start(photos, sizes=(64, 16))
    with pytest.raises(ValueError, match="global_batch_size=20 is not a multiple"):
        start(photos, sizes=(20, 16))
    with pytest.raises(ValueError, match="samples_seen=8 is not a multiple of global_batch_size=16"):
        start(photos, cursor=Cursor(epoch=0, samples_seen=8))


# --- Memory ---


@pytest.mark.parametrize("decoded_mib", [1, 4])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_batch_that_is_too_large_is_decoded_in_parts_and_the_same(tmp_path, monkeypatch, decoded_mib, prefetch):
    folder = tmp_path / "set" / "only"
    folder.mkdir(parents=True)
    for number in range(8):
        Image.fromarray(photo(300 + 30 * number, 400, number)).save(folder / f"{number}.jpg")
    spoiled = folder / "3.jpg"
    source = ImageFolder(tmp_path / "set", tmp_path / "cache")
    spoiled.write_bytes(BAD_BYTES["a broken table"](spoiled.read_bytes()))
    data = replace(DATA, prefetch=prefetch)
    whole = take(start(source, PLAIN, data=data, sizes=(8, 4)), 6)
    fed = []
    run = stream.BatchStream.feed
    monkeypatch.setattr(stream.BatchStream, "feed", lambda self: fed.append(run(self)) or fed[-1])
    small = replace(data, decoded_mib=decoded_mib)
    parts = take(start(source, PLAIN, data=small, sizes=(8, 4)), 6)
    for ours, expected in zip(parts, whole, strict=True):
        assert all(
            torch.equal(getattr(ours, name), getattr(expected, name)) for name in ("images", "labels", "positions")
        )
        assert torch.equal(ours.samples, expected.samples)
    assert max(len(encoded) for encoded, *_ in fed) < 4
    evaluated = list(eval_stream(Reader(source), small, 5, World(), CPU))
    expected = list(eval_stream(Reader(source), data, 5, World(), CPU))
    assert all(torch.equal(ours.images, theirs.images) for ours, theirs in zip(evaluated, expected, strict=True))


def test_parts_hold_what_is_allowed_or_one_image():
    request = stream.BatchRequest(1, np.arange(5), np.arange(5) + 10, np.zeros(5, np.int64), frozenset({12}))
    parts = list(request.in_parts(np.array([3, 4, 9, 1, 2]), 7))
    assert [part.samples.tolist() for part in parts] == [[10, 11], [12], [13, 14]]
    assert [part.goes_on for part in parts] == [True, True, False]
    assert all(part.doubtful == {12} and part.epoch == 1 for part in parts)


def test_threads_hold_so_many_bytes_at_once_and_no_more():
    gate, held, most = ByteGate(10), [0], [0]
    lock = threading.Lock()

    def work(count):
        with gate.hold(count):
            with lock:
                held[0] += count
                most[0] = max(most[0], held[0])
            time.sleep(0.002)
            with lock:
                held[0] -= count

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, [3, 4, 25, 6, 1, 9, 10, 2] * 4))
    assert most[0] == 25  # alone
    with gate.hold(10):
        pass
