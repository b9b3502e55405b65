"""What all tests share: the tiers, their processes, and the runs that many of them start from."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes with a thread for each core, whose ranks have some too, wait for each other more than they compute.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, which has to be chosen before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import shutil
from pathlib import Path

import pytest
from PIL import Image

MAX_PROCESSES = 4  # each with a warm server of its own for its ranks, half a gigabyte

# The files that take longest, longest first: begun last, one of them would keep one process busy while the others rest.
LONG_FILES = ("test_slurm", "test_train", "test_slurm_versions", "test_slurm_accounting")


def pytest_xdist_auto_num_workers(config):
    """A process per core for a whole tier; none beside pytest's own for a file or two.

    One more for all tests: those on a cluster, the longest files, wait more than they compute.
    """
    files = [argument for argument in config.args if ".py" in argument]
    everything = not config.option.markexpr
    return 0 if files else min(MAX_PROCESSES, len(os.sched_getaffinity(0)) + everything)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if any(item.get_closest_marker(tier) for tier in ("fault", "slurm")):
            item.add_marker("slow")
    rank = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(Path(item.path).stem, len(rank)))  # stable


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """40 images in two classes, of several sizes, file formats and colour modes, some turned by EXIF."""
    from stream_cases import photo

    from cit_scale.datasets.sources import ImageFolder

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


@pytest.fixture(scope="session")
def tiny_digits(tmp_path_factory):
    from cit_scale.datasets.sources import digits

    return digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory):
    """Recipe, data set and teacher of ``tiny_run.TinyRun``. Shared: a test that harms them copies them first."""
    from tiny_run import make_inputs

    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def calm(tiny_inputs, tmp_path_factory):
    """``calm(layout)``: the tiny run that nobody disturbed, once per session."""
    from tiny_run import TinyRun

    runs = {}

    def run(layout="zero1"):
        if layout not in runs:
            runs[layout] = TinyRun(tiny_inputs, tmp_path_factory.mktemp("calm"), layout)
            runs[layout].finish()
        return runs[layout]

    return run


@pytest.fixture(scope="session")
def finished(calm):
    """The folder of the tiny run on one process that nobody disturbed."""
    return calm("plain").run_dir


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of ``finished``, to be harmed."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def tiny_run(tiny_inputs, tmp_path):
    """A tiny run on two ranks under ZeRO-1, not yet started."""
    from tiny_run import TinyRun

    return TinyRun(tiny_inputs, tmp_path / "runs")


@pytest.fixture(scope="session")
def halted_once(tiny_inputs, tmp_path_factory):
    import sabotage
    from tiny_run import TinyRun

    run = TinyRun(tiny_inputs, tmp_path_factory.mktemp("halted"))
    ended = run.run(sabotage=(sabotage.at, 0, "backward", 11, sabotage.die))
    assert ended.code != 0, ended.output
    assert run.checkpoints() == ["step_000004", "step_000008"]
    return run


@pytest.fixture
def halted(halted_once, tmp_path):
    """A tiny run that was killed in step 11, with checkpoints of steps 4 and 8; the test's own copy."""
    return halted_once.copy(tmp_path / "runs")


@pytest.fixture(scope="session")
def ds_configs(tmp_path_factory) -> str:
    """Where the rows of engine_cases.SHARDINGS that are not shipped stand as files."""
    from engine_cases import write_ds_configs

    folder = tmp_path_factory.mktemp("ds_configs")
    write_ds_configs(folder)
    return str(folder)
