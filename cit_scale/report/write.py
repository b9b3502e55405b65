"""``cit-scale report``: asks a run's networks about its evaluation set, and writes what they say as one page."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from cit_scale.config import RunConfig
from cit_scale.datasets.index import printable
from cit_scale.datasets.sources import Source
from cit_scale.distributed.world import World, broadcast, run_on_all_ranks
from cit_scale.errors import (
    BadImageError,
    ConfigError,
    MissingInputError,
    RunError,
    error_line,
    is_out_of_memory,
)
from cit_scale.inference.entry import SMALLER_BATCHES, run_command
from cit_scale.inference.evaluate import run_config
from cit_scale.inference.outputs import check_output, is_replaceable, write_output
from cit_scale.report import pictures
from cit_scale.report.answers import Survey, survey
from cit_scale.report.attention import transformer_of
from cit_scale.report.history import read_history
from cit_scale.report.networks import Advised, open_advised
from cit_scale.report.page import Example, Found, Part, render
from cit_scale.run.bad_images import FILE as BAD_IMAGES
from cit_scale.run.folders import RunFolder, is_run, number, read_text
from cit_scale.run.noted import noted_versions
from cit_scale.run.show import as_date, run_record, state_in_folder
from cit_scale.run_folder import CHECKPOINTS, CONFIG, REPORT, STUDENT, saved_steps

T = TypeVar("T")

EXAMPLES = 16  # of the worst mistakes, and of the most doubtful images
ATTENDED = 8  # images of which attention is shown: half of them mistakes, if there are as many


def run(arguments: argparse.Namespace) -> int:
    """Run ``cit-scale report``. arguments: parsed by `cit_scale.report.commands`. Returns an exit code."""

    def work(world: World) -> None:
        run_dir = run_dir_of(arguments.run)
        out = run_dir / REPORT
        if arguments.out is not None:
            out = check_output("--out", arguments.out, [arguments.data or ""])
        began_at = time.perf_counter()
        found = make_report(
            run_dir,
            out,
            world,
            weights=arguments.run,
            data=arguments.data,
            only_known=arguments.only_known,
            batch_size=arguments.batch_size,
            threads=arguments.threads,
        )
        if found is not None and world.is_main:
            for note in found:
                print(note, file=sys.stderr)
            print(f"{printable(out)}, {out.stat().st_size / 1e6:.1f} MB, in {time.perf_counter() - began_at:.0f} s")

    return run_command(work, needs_less_memory=SMALLER_BATCHES)


def run_dir_of(name: str) -> Path:
    """The run folder that was named, or in which the named weights lie. Raises MissingInputError."""
    path = Path(name).expanduser()
    if not name or not path.exists():
        raise MissingInputError(f"{printable(name) or 'an empty name'} does not exist; give a run folder")
    # A file of weights, the folder of a checkpoint, a file in it.
    for folder in [path, *path.absolute().parents[:3]]:
        if folder.is_dir() and is_run(folder):
            return folder
    raise MissingInputError(f"{printable(name)} is no run folder, and lies in none; cit-scale runs list shows them")


def make_report(
    run_dir: Path,
    out: Path,
    world: World,
    *,
    weights: str | None = None,
    data: str | None = None,
    only_known: bool = False,
    batch_size: int | None = None,
    threads: int = 4,
    goes_on: Callable[[], bool] = lambda: True,
) -> list[str] | None:
    """Collective. Write the page of a run. Returns what is to be said of it, on all ranks; None if ``goes_on`` returned
    False on rank 0, before anything was written.

    weights: as ``open_network`` takes them; None: the run's. data, only_known, batch_size, threads: as
    ``evaluate_classifier`` takes them. A part that cannot be made says why; the page is written as a whole or not at
    all. Raises ConfigError for ``data`` that was given and cannot be used, and OSError.
    """
    run_on_all_ranks(world, lambda: _try_to_write(out) if world.is_main else None)  # before images are asked about
    run = RunFolder(run_dir.name, run_dir)
    advised: Part[Advised] = _part(lambda: _open(weights or str(run_dir), run_dir, world))
    asked: Part[Survey | None] = Part(reason=advised.reason)
    if advised.found is not None:
        ask = partial(
            survey,
            advised.found,
            world,
            data=data,
            only_known=only_known,
            batch_size=batch_size,
            threads=threads,
            goes_on=goes_on,
        )
        # What was asked for has to be there; the run's own images may be gone since.
        asked = Part(ask()) if data is not None else _part(ask)
        if broadcast(world, asked.found is None and not asked.reason):
            return None
    notes: list[str] = []

    def write() -> None:
        if world.is_main:
            found = _assemble(run, advised, asked, world)
            write_output(out, render(found))
            notes.extend(_notes(advised, found))

    run_on_all_ranks(world, write)
    return broadcast(world, notes)


def _try_to_write(out: Path) -> None:
    """Raise OSError where the file's folder takes none."""
    if is_replaceable(out):
        trial = out.with_name(f"{out.name}.partial")  # as ``write_text`` calls it
        trial.touch()
        trial.unlink()


def _notes(advised: Part[Advised], found: Found) -> list[str]:
    said = [] if advised.found is None else list(advised.found.student.notes)
    if found.survey.found is None:
        said.append(f"without an evaluation: {found.survey.reason}")
    return [*said, *(f"without teacher {name}: {reason}" for name, reason in found.missing.items())]


def _open(name: str, run_dir: Path, world: World) -> Advised:
    config = run_on_all_ranks(world, lambda: _config(name, run_dir))
    return open_advised(name, config, world)


def _config(name: str, run_dir: Path) -> RunConfig:
    """The run's configuration. Raises MissingInputError where there are no weights yet."""
    if Path(name) == run_dir and not (run_dir / STUDENT).exists() and not saved_steps(run_dir / CHECKPOINTS):
        raise MissingInputError("the student has no checkpoint yet")
    return run_config(run_dir)


def _part(make: Callable[[], T]) -> Part[T]:
    """What a function returns, or why it cannot. An error of our own making is raised, and memory that is used up."""
    try:
        return Part(make())
    except (RunError, BadImageError, OSError) as error:
        return Part(reason=error_line(error))
    except RuntimeError as error:  # of DALI, of a model
        if is_out_of_memory(error):
            raise
        return Part(reason=error_line(error))


def _assemble(run: RunFolder, advised: Part[Advised], asked: Part[Survey | None], world: World) -> Found:
    """On rank 0. All that the page shows."""
    answers = asked.found
    worst, doubtful = ([], []) if answers is None else (worst_mistakes(answers), most_doubtful(answers))
    config = _part(lambda: run_config(run.folder))
    samples: Part[Sequence[pictures.TrainingSample]] = Part(reason=config.reason)
    if config.found is not None:
        samples = _part(partial(_training_samples, run, config.found, world))
    attention: Part[Sequence[pictures.AttendedImage]] = Part(reason=asked.reason)
    if answers is not None and advised.found is not None:
        attention = _part(partial(_attention, advised.found, answers, worst, world))
    return Found(
        record=run_record(run, state_in_folder(run)),
        config_text=read_text(run.folder / CONFIG),
        histories={phase.name: read_history(phase) for phase in (run.student, *run.phases[:-1])},
        survey=asked,
        weights="" if advised.found is None else advised.found.student.weights,
        models={} if config.found is None else {name: each.model for name, each in config.found.teachers.items()},
        missing={} if advised.found is None else advised.found.missing,
        worst=worst,
        doubtful=doubtful,
        attention=attention,
        samples=samples,
        bad_images=_bad_images(run.folder, answers),
        made=f"Made by CiT-Scale {importlib.metadata.version('cit-scale')} on {as_date(time.time())}",
    )


def _training_samples(run: RunFolder, config: RunConfig, world: World) -> Sequence[pictures.TrainingSample]:
    first = run.student.starts[0] if run.student.starts else {}
    ranks = int(number(first.get("world_size")) or 1)
    return pictures.training_samples(config, noted_versions(run.folder), ranks, world.device)


def worst_mistakes(answers: Survey) -> list[Example]:
    """The mistakes whose label the student thinks least likely."""
    wrong = np.flatnonzero(~answers.correct)
    return _examples(answers, wrong[np.argsort(-answers.student.nll[wrong], kind="stable")])


def most_doubtful(answers: Survey) -> list[Example]:
    return _examples(answers, np.argsort(-answers.student.entropy, kind="stable"))


def _examples(answers: Survey, places: np.ndarray) -> list[Example]:
    return [Example(int(place), _thumbnail(answers.source, int(answers.samples[place]))) for place in places[:EXAMPLES]]


def _thumbnail(source: Source, sample: int) -> str:
    """Empty for an image that is gone since it was asked about."""
    try:
        return pictures.thumbnail(source, sample)
    except (BadImageError, OSError):
        return ""


def _attention(
    advised: Advised, answers: Survey, worst: Sequence[Example], world: World
) -> Sequence[pictures.AttendedImage]:
    network = advised.student.network
    if transformer_of(network) is None:
        raise ConfigError(f"{network.architecture} is no vision transformer whose attention can be read")
    wrong = [example.place for example in worst[: ATTENDED // 2]]
    right = np.flatnonzero(answers.correct)
    few = ATTENDED - len(wrong)
    # Spread over the data set, whose images stand class by class.
    spread = right[np.linspace(0, len(right) - 1, few).round().astype(int)] if len(right) > few else right
    places = [*spread.tolist(), *wrong]
    samples = [int(answers.samples[place]) for place in places]
    return pictures.attended_images(network, advised.student.interface, answers.source, samples, world.device)


def _bad_images(run_dir: Path, answers: Survey | None) -> list[tuple[str, str]]:
    """Of the run's list, and those that this page's survey met."""
    listed = (line.partition("\t") for line in read_text(run_dir / BAD_IMAGES).splitlines())
    found = {name: reason for name, _, reason in listed}
    return sorted({**found, **(answers.unusable if answers else {})}.items())
