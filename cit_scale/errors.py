"""Exceptions and exit codes of a run: one of each for every kind of action that the user has to take next.

    0   done
    2   bad usage: a setting, an argument or a file of settings is wrong, or the device's memory is too small for them
    3   an input is missing or cannot be read: a data set, weights, a recipe, a checkpoint
    4   bad data: more images are unusable than data.max_bad_images allows
    5   diverged: train.max_bad_steps steps in a row were not finite, or the weights are no longer finite
    6   cannot write: the run folder's disk is full, read-only or gone
    7   refused: continuing would mix two runs, start over by accident, or execute code from a file
    8   a node is unfit or missing: the message names it, and a start without the node may succeed
    14  hung: no step ended within train.step_timeout_s, or the preparation of several ranks took far too long
    75  stopped on request with everything saved: the same command continues (EX_TEMPFAIL of sysexits.h)

Exit code 1, Python's own, stands for unforeseen errors and for passing failures of the machine, its network or its
disks. The same command may succeed later, so launchers/requeue.py queues the job again.
"""

from __future__ import annotations

import errno
import re

HUNG = 14  # the number of SIGALRM, with which the watchdog ends a rank (distributed/overseer.py)

# Errors of a path that last until the user changes something.
WRONG_PATH = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
# Errors of a disk that is full, over quota or read-only.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class RunError(Exception):
    """Base of all expected errors. The message is one line with the values and the way out.

    The entry points print the message and exit with ``exit_code``.
    """

    exit_code: int


class ConfigError(RunError, ValueError):
    """A setting, an argument or a file of settings is wrong."""

    exit_code = 2


class MissingInputError(ConfigError):
    """An input of the run is missing or cannot be read."""

    exit_code = 3


class DeviceMemoryError(ConfigError):
    """The device's memory is too small for the run. Maybe of this rank alone, so each rank that meets it prints it."""


class BadDataError(RunError):
    """More images are unusable than data.max_bad_images allows."""

    exit_code = 4


class DivergedError(RunError):
    """Loss, gradient or weights are not finite, and training cannot continue."""

    exit_code = 5


class CannotWriteError(RunError, OSError):
    """A checkpoint or another file of the run could not be written."""

    exit_code = 6


class TransientError(RunError, OSError):
    """The machine, its network or a network disk failed for a moment; the same command may succeed later."""

    exit_code = 1


class RefusedError(ConfigError):
    """Refused: would lose data or execute code."""

    exit_code = 7


class BadImageError(ValueError):
    """An image cannot be used. The message is the reason, in one line and without the image's name."""

    exit_code = BadDataError.exit_code


class UnfitNodeError(RunError):
    """A node is missing or failed the preflight check."""

    exit_code = 8


class Stopped(RunError):  # noqa: N818  an outcome, not an error
    """The run saved its state and ends because it was asked to stop.

    step: number of updates done. signum: the signal; None on a rank that received none.
    """

    exit_code = 75

    def __init__(self, step: int, signum: int | None) -> None:
        # Exceptions travel between ranks as pickles, and unpickling passes ``args`` to the constructor again.
        super().__init__(step, signum)
        self.step = step
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped after step {self.step}"


def one_line(error: object, most: int | None = None) -> str:
    """Returns an error's message in one line, cut after ``most`` characters; the type's name if there is no message."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()) or type(error).__name__  # without colours
    return text if most is None or len(text) <= most else f"{text[:most]} ..."


MOST_CHARACTERS, MOST_OF_A_WORD = 490, 120  # of a line that refuses something


def error_line(error: object) -> str:
    """An error's message in one line of at most MOST_CHARACTERS: long words, such as paths, and then the whole lose
    their middle. The way out stands at the end.
    """
    text = " ".join(_without_middle(word, MOST_OF_A_WORD) for word in one_line(error).split(" "))
    return _without_middle(text, MOST_CHARACTERS)


def _without_middle(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = (most - len(" ... ")) // 2
    return f"{text[:half]} ... {text[-half:]}"


OUT_OF_MEMORY = re.compile(
    # torch's allocator and the driver: "CUDA out of memory. Tried to allocate", "CUDA error: out of memory"; Triton's
    # "Triton Error [CUDA]: out of memory" and NCCL's "Cuda failure 2 'out of memory'". Triton's "out of resource" is
    # a kernel that is too large for the card, which no smaller batch mends.
    r"out of memory"
    # cuBLAS, cuFFT and cuSOLVER: CUBLAS_STATUS_ALLOC_FAILED; cuDNN 9: ..._DEVICE_ALLOCATION_FAILED.
    r"|[A-Z]_ALLOC(ATION)?_FAILED"
    r"|CUDA allocation failed"  # DALI's CUDABadAlloc, which pybind11 makes a MemoryError
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory",  # torch on a CPU
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a library says that a device's memory, or torch's on a CPU, is used up.

    By name and text: torch's OutOfMemoryError is not imported here, and other libraries raise a plain RuntimeError.
    """
    is_torchs = type(error).__name__ == "OutOfMemoryError"
    return is_torchs or (isinstance(error, RuntimeError | MemoryError) and bool(OUT_OF_MEMORY.search(str(error))))


def exit_code_of(error: RunError | BadImageError | OSError) -> int:
    """Returns the exit code of a process that ends with ``error``.

    An OSError without an errno counts as a damaged input (3): libraries raise it for files that they cannot parse, such
    as PIL's UnidentifiedImageError.
    """
    if isinstance(error, (RunError, BadImageError)):
        return error.exit_code
    if error.errno in NO_ROOM:
        return CannotWriteError.exit_code
    if error.errno is None or error.errno in WRONG_PATH:
        return MissingInputError.exit_code
    return TransientError.exit_code


def os_error(error: Exception, message: str, lasting: type[RunError]) -> RunError:
    """Returns the exception to raise with ``message`` for an OSError, or for an OSError that Rust or C++ has wrapped.

    lasting: the type for errors that another try would meet again. A full or read-only disk is always a
    CannotWriteError. If ``lasting`` is ConfigError, a wrong path is a MissingInputError. Any error that may pass is a
    TransientError.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (written := re.search(r"os error (\d+)", str(error))):
        # safetensors is written in Rust and reports an OSError as text: "No such file or directory (os error 2)".
        code = int(written[1])
    if code in NO_ROOM:
        return CannotWriteError(message)
    if code in WRONG_PATH and lasting is ConfigError:
        return MissingInputError(message)
    # EEXIST and EFBIG last as well: a file in the place of a folder, and a limit on the size of files, stay as they
    # are. Without an errno the content is wrong, which does not pass either.
    # EINVAL is what torch says of a zip file that is cut short.
    is_lasting = code is None or code in WRONG_PATH | {errno.EEXIST, errno.EFBIG, errno.EINVAL}
    return lasting(message) if is_lasting else TransientError(message)
