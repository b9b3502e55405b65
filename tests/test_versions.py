"""A run goes on with the versions of the stream that it began with; new ones get the latest."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from jobs import Job
from PIL import Image

from cit_scale.config import DataConfig
from cit_scale.data.versions import FIRST, LATEST, StreamVersions, read_versions
from cit_scale.datasets import pixels
from cit_scale.datasets.sources import open_sources
from cit_scale.distributed.world import World
from cit_scale.errors import RefusedError
from cit_scale.inference.classifier import open_classifier
from cit_scale.inference.evaluate import open_images
from cit_scale.run.noted import noted_versions

RUN = Path(__file__).parent / "data" / "run_of_version_1.tar.gz"
"""Step 4 of 14 of a run with repeats, as it was written before there were versions, and the losses of all its steps."""


def write_images(folder):
    """The images of that run: a third of them lies on its side, or on its head."""
    for number, name in enumerate(("1", "2", "10")):
        (folder / name).mkdir(parents=True)
        for i in range(24):
            colours = np.random.default_rng(100 * number + i).integers(0, 256, (4, 6, 3), dtype=np.uint8)
            image = Image.fromarray(colours).resize((30, 20), Image.Resampling.BICUBIC)
            exif = Image.Exif()
            if i % 3 == 0:
                exif[0x0112] = (6, 3, 8)[i // 3 % 3]
            image.save(folder / name / f"{i:02}.jpg", quality=90, exif=exif)


@pytest.fixture
def old_run(tmp_path):
    shutil.unpack_archive(RUN, tmp_path)
    write_images(tmp_path / "images")
    return tmp_path


def finish(folder, *more):
    paths = ["--runs_dir", str(folder / "runs"), "--data.train", str(folder / "images")]
    return Job(["--config", str(folder / "old.yaml"), *paths, *more], ranks=1).wait()


def losses(run_dir):
    notes = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {note["step"]: note["loss"] for note in notes if "loss" in note}


def test_a_run_of_the_first_version_goes_on_with_its_images(old_run):
    ended = finish(old_run)
    assert ended.code == 0, ended.output
    assert "continues after step 4" in ended.output
    run_dir = old_run / "runs" / "old"
    expected = {int(step): loss for step, loss in json.loads((old_run / "losses.json").read_text()).items()}
    found = losses(run_dir)
    assert list(found) == list(range(5, 15))
    assert all(math.isclose(found[step], expected[step], rel_tol=2e-3) for step in found)
    assert json.loads((run_dir / "results.json").read_text())["stream"] == {
        "order": 1,
        "draws": 1,
        "pixels": 1,
        "mixing": 1,
    }
    assert noted_versions(run_dir) == FIRST
    # It is evaluated on what it has not seen, though classes are ordered otherwise today: 1, 10, 2 then.
    images = DataConfig(train=str(old_run / "images"), cache_dir=str(old_run / "cache"))
    here = open_images(open_classifier(str(run_dir), World()), None)
    held_out = open_sources(images, pixels.FIRST)[1]
    assert {here.key(index) for index in range(len(here))} == {held_out.key(index) for index in range(len(held_out))}
    assert here.classes == ("1", "10", "2")
    # Begun anew it gets today's images, which are others: repeats stand elsewhere.
    ended = finish(old_run, "--fresh")
    assert ended.code == 0, ended.output
    assert noted_versions(run_dir) == LATEST
    found = losses(run_dir)
    assert any(not math.isclose(found[step], expected[step], rel_tol=2e-2) for step in range(5, 15))


def test_a_run_that_has_not_begun_gets_the_latest(tmp_path):
    assert noted_versions(tmp_path) == LATEST


def test_versions_of_another_program_are_refused_in_one_line(old_run):
    note = old_run / "runs" / "old" / "results.json"
    note.write_text(json.dumps({"inputs": {}, "stream": {"order": 99, "draws": 1}}))
    with pytest.raises(RefusedError, match=re.escape("(order 99); go on with that one")):
        noted_versions(note.parent)


@pytest.mark.parametrize("noted", [{"order": 0}, {"order": "2"}, {"colours": 1}, {"order": None}])
def test_what_is_no_version_is_refused(noted):
    with pytest.raises(RefusedError, match="begun by another version"):
        read_versions(noted, "runs/x")


def test_the_first_versions_leave_a_fingerprint_as_it_was():
    assert FIRST.fingerprint("abc") == "abc"
    others = [
        StreamVersions(order=2, draws=1, pixels=1, mixing=1),
        StreamVersions(order=1, draws=2, pixels=1, mixing=1),
    ]
    assert len({FIRST.fingerprint("abc"), *(each.fingerprint("abc") for each in others)}) == 3
