"""How a run ends: by exit codes, which requeue.py and people go by."""

import errno
import os
import pickle

import pytest
from PIL import UnidentifiedImageError
from safetensors import SafetensorError

from cit_scale import cli, errors
from cit_scale.config import DataConfig
from cit_scale.distributed.lock import exclusive
from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.world import World
from cit_scale.errors import (
    CannotWriteError,
    MissingInputError,
    RunError,
    TransientError,
    error_line,
    exit_code_of,
    os_error,
)
from cit_scale.models.weights import read_weights
from cit_scale.run import setup
from launchers import requeue

WRONG_PATH = ["ENOENT", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP"]
NO_ROOM = ["ENOSPC", "EDQUOT", "EROFS"]


@pytest.mark.parametrize("name", sorted(errno.errorcode.values()))
def test_only_a_wrong_path_is_a_missing_input_and_only_a_disk_without_room_cannot_be_written(name):
    code = exit_code_of(OSError(getattr(errno, name), "what the system says"))
    assert code == (3 if name in WRONG_PATH else 6 if name in NO_ROOM else 1)
    assert (code in requeue.HOPELESS) == (name in WRONG_PATH + NO_ROOM)


def test_an_error_without_a_number_is_a_file_that_makes_no_sense():
    assert exit_code_of(UnidentifiedImageError("cannot identify image file")) == 3


@pytest.mark.parametrize("kind", [each for each in vars(errors).values() if isinstance(each, type)])
def test_an_error_of_ours_says_its_exit_code_itself(kind):
    if kind in (RunError, errors.Stopped):
        return
    assert exit_code_of(kind("a line")) == kind.exit_code
    again = pickle.loads(pickle.dumps(kind("a line")))  # as it travels to the other ranks
    assert (type(again), str(again)) == (kind, "a line")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EACCES, "denied"), MissingInputError),
        (OSError(errno.EEXIST, "a file of that name"), MissingInputError),
        (OSError("no number"), MissingInputError),
        (ValueError("no image"), MissingInputError),
        (OSError(errno.ENOSPC, "full"), CannotWriteError),
        (OSError(errno.EHOSTUNREACH, "no route"), TransientError),
        (SafetensorError("I/O error: Stale file handle (os error 116)"), TransientError),
        (SafetensorError("I/O error: Permission denied (os error 13)"), MissingInputError),
        (OSError("Too many open files (os error 24)"), TransientError),
        (SafetensorError("invalid header"), MissingInputError),
        (FileExistsError(errno.EEXIST, "a file of that name"), MissingInputError),
    ],
)
def test_what_passes_by_itself_is_told_from_what_lasts(error, expected):
    found = os_error(error, "a line", lasting=MissingInputError)
    assert (type(found), str(found)) == (expected, "a line")


def failing(code):
    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    return fail


# Each place in which a run reads or writes before its first step and gives a reason of its own.
PLACES = {
    "the data": ("cit_scale.run.setup.open_sources", lambda tmp_path: setup.open_images(DataConfig(train="images"))),
    "weights, to find": ("pathlib.Path.is_file", lambda tmp_path: read_weights(tmp_path / "weights.safetensors")),
    "weights, to open": ("pathlib.Path.open", lambda tmp_path: read_weights(tmp_path / "weights.safetensors")),
    "weights": ("safetensors.torch.load_file", lambda tmp_path: read_weights(tmp_path / "weights.safetensors")),
    "a recipe": ("pathlib.Path.read_bytes", lambda tmp_path: cli.parse_arguments(["--config", "digits"])),
    "the settings of the run": (
        "pathlib.Path.read_text",
        lambda tmp_path: setup.check_same_run(cli.parse_arguments(["--runs_dir", str(tmp_path)]).config),
    ),
    "the lock": (
        "os.open",
        lambda tmp_path: exclusive(tmp_path / "run", World(), StopRequest()).__enter__(),
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("code", [errno.ENOTCONN, errno.ESTALE, errno.EMFILE, errno.EIO, errno.EACCES])
def test_a_fault_that_passes_has_the_exit_code_of_one_wherever_it_is_met(place, code, tmp_path, monkeypatch):
    called, call = PLACES[place]
    (tmp_path / "weights.safetensors").touch()
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "config.yaml").touch()
    cli.parse_arguments([])  # imports pydantic, which reads the versions of packages from files
    monkeypatch.setattr(called, failing(code))
    with pytest.raises((RunError, OSError)) as caught:
        call(tmp_path)
    monkeypatch.undo()
    expected = 1 if code != errno.EACCES else {"the settings of the run": 7, "the lock": 6}.get(place, 3)
    assert exit_code_of(caught.value) == expected, caught.value


@pytest.mark.parametrize(
    "text", ["x" * 4000, "a b " * 900, f"{'/deep' * 800} has no images; give another folder", "a\nb"]
)
def test_an_error_is_one_line_of_at_most_500_characters_with_the_way_out(text):
    line = f"error: {error_line(ValueError(text))}"
    assert "\n" not in line
    assert len(line) <= 500
    assert line.endswith(text.split()[-1][-20:])


def test_a_long_path_loses_its_middle_alone():
    line = error_line(f"data.train={'/deep' * 800} is no data set; give a folder")
    assert line.startswith("data.train=/deep/deep")
    assert line.endswith("/deep is no data set; give a folder")
    assert len(line) < 200
