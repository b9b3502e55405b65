"""How a run can end other than well: one exception, and one exit code, for each kind of thing a user has to do next.

    0   done
    2   bad usage: a setting, an argument or a file of settings is wrong
    3   an input is missing or cannot be read: a data set, weights, a recipe, a checkpoint
    4   bad data: more images cannot be used than data.max_bad_images
    5   diverged: train.max_bad_steps steps in a row were not finite, or the weights no longer are
    6   cannot write: the run folder's disk is full, read-only or gone
    7   refused for safety: going on would mix two runs, start over by accident, or run what a file contains
    8   a node is not fit to take part: it is named, and another try without it may go well
    14  hung: no step ended within train.step_timeout_s, or the preparation of several ranks took far too long
    75  stopped on request, everything saved: the same command continues (EX_TEMPFAIL of sysexits.h)

1, Python's own, is left to what nobody foresaw, and to the machine, its network and its disks failing for a moment: the
same command may well go on, so a queued job is queued again.
"""

from __future__ import annotations

import errno
import re

HUNG = 14

# What is wrong with a path, and stays wrong until somebody does something about it.
WRONG_PATH = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
# A disk that takes no more.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class RunError(Exception):
    """One line with the values and the way out. The entry points print it and exit with its code."""

    exit_code: int


class ConfigError(RunError, ValueError):
    """A mistake of the user's."""

    exit_code = 2


class MissingInputError(ConfigError):
    """What the run is to read is not there."""

    exit_code = 3


class BadDataError(RunError):
    """More of the data than the run would bear cannot be used."""

    exit_code = 4


class DivergedError(RunError):
    """Training has no finite way on."""

    exit_code = 5


class CannotWriteError(RunError, OSError):
    """What has to be kept could not be written."""

    exit_code = 6


class TransientError(RunError, OSError):
    """The machine, its network or a network disk failed for a moment; another try may go well."""

    exit_code = 1


class RefusedError(ConfigError):
    """Refused: would lose data or execute code."""

    exit_code = 7


class BadImageError(ValueError):
    """An image that nothing can be learned from. The message is the reason, in one line and without the name."""

    exit_code = BadDataError.exit_code


class UnfitNodeError(RunError):
    """A node failed the check at the start."""

    exit_code = 8


class Stopped(RunError):  # noqa: N818  an outcome, not an error
    """The run saved its state and left because it was asked to. signum: the signal; None on a rank that got none."""

    exit_code = 75

    def __init__(self, step: int, signum: int | None) -> None:
        super().__init__(step, signum)  # what unpickling on another rank calls it with
        self.step = step
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped after step {self.step}"


def one_line(error: object, most: int | None = None) -> str:
    """What an error says, in one line of at most ``most`` characters; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if most is None or len(text) <= most else f"{text[:most]} ..."


def exit_code_of(error: RunError | BadImageError | OSError) -> int:
    """The exit code of a process that ends with ``error``.

    An OSError without a number is a file that a library cannot make sense of, such as PIL's UnidentifiedImageError.
    """
    if isinstance(error, (RunError, BadImageError)):
        return error.exit_code
    if error.errno in NO_ROOM:
        return CannotWriteError.exit_code
    if error.errno is None or error.errno in WRONG_PATH:
        return MissingInputError.exit_code
    return TransientError.exit_code


def os_error(error: Exception, message: str, lasting: type[RunError]) -> RunError:
    """What to raise, saying ``message``, for an OSError, or for what Rust or C++ made of one.

    lasting: for what another try would meet again. A disk that takes no more is a CannotWriteError; a wrong path is
    a MissingInputError where it would be a mistake of the user's; anything else is a TransientError.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (written := re.search(r"os error (\d+)", str(error))):
        code = int(written[1])  # as Rust spells it, in which safetensors is written
    if code in NO_ROOM:
        return CannotWriteError(message)
    if code in WRONG_PATH and lasting is ConfigError:
        return MissingInputError(message)
    # A name that is taken by a file of another kind stays taken, and a limit to the size of files stays set.
    is_lasting = code is None or code in WRONG_PATH | {errno.EEXIST, errno.EFBIG}
    return lasting(message) if is_lasting else TransientError(message)
