"""How a run can end other than well: one exception, and one exit code, for each kind of thing a user has to do next.

    0   done
    2   bad usage: a setting, an argument or a file of settings is wrong
    3   an input is missing or cannot be read: a data set, weights, a recipe, a checkpoint
    4   bad data: more images cannot be used than data.max_bad_images
    5   diverged: train.max_bad_steps steps in a row were not finite, or the weights no longer are
    6   cannot write: the run folder's disk is full, read-only or gone
    7   refused for safety: going on would mix two runs, start over by accident, or run what a file contains
    8   a node is not fit to take part: it is named, and another try without it may go well
    14  hung: no step ended within train.step_timeout_s
    75  stopped on request, everything saved: the same command continues (EX_TEMPFAIL of sysexits.h)

1, Python's own, is left to what nobody foresaw.
"""

from __future__ import annotations

HUNG = 14


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


class RefusedError(ConfigError):
    """It could be done, and something would be lost or run by it."""

    exit_code = 7


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
