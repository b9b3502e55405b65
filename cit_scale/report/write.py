"""``cit-scale report``: asks a run's networks about its evaluation set, and writes what they say as one page."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from cit_scale.config import RunConfig, split_batch
from cit_scale.datasets.index import printable
from cit_scale.datasets.pixels import BY_VERSION
from cit_scale.datasets.sources import Source, open_sources
from cit_scale.distributed.world import World, broadcast, run_on_all_ranks
from cit_scale.errors import BadImageError, ConfigError, MissingInputError, error_line, is_out_of_memory
from cit_scale.inference.entry import SMALLER_BATCHES, run_command
from cit_scale.inference.evaluate import evaluation_set, named_set, run_config, run_pixels
from cit_scale.inference.outputs import check_output, is_replaceable, write_output
from cit_scale.inference.turns import portable
from cit_scale.report import pictures
from cit_scale.report.answers import OWN_SET, Survey, ask_networks, spread_places
from cit_scale.report.attention import transformer_of
from cit_scale.report.history import read_history
from cit_scale.report.html import PAGE_SUFFIXES
from cit_scale.report.networks import RunNetworks, open_run_networks
from cit_scale.report.page import Content, Example, Part, render
from cit_scale.run.folders import RunFolder, is_run, number, read_text
from cit_scale.run.inputs import DATA, EVALUATION_DATA
from cit_scale.run.noted import noted_inputs, noted_versions
from cit_scale.run.plan import counted
from cit_scale.run.show import as_date, run_record, state_in_folder
from cit_scale.run_folder import BAD_IMAGES, CHECKPOINTS, CONFIG, REPORT, STUDENT, TEACHERS, saved_steps
from cit_scale.text import escape_unencodable

T = TypeVar("T")

EXAMPLES = 16  # of the worst mistakes, and of the most doubtful images
ATTENDED = 8  # images of which attention is shown: half of them mistakes, if there are as many


def run(arguments: argparse.Namespace) -> int:
    """Run ``cit-scale report``. arguments: parsed by `cit_scale.report.commands`. Returns an exit code."""

    def work(world: World) -> None:
        run_dir = run_dir_of(arguments.run)
        is_whole_run = os.path.realpath(arguments.run) == os.path.realpath(run_dir)
        if arguments.out is None and (arguments.data is not None or not is_whole_run):
            raise ConfigError(f"{REPORT} is the page of the run's own weights and images; give another file by --out")
        inputs = [arguments.run, arguments.data or ""]
        out = check_output("--out", arguments.out or str(run_dir / REPORT), inputs, suffixes=PAGE_SUFFIXES)
        began_at = time.perf_counter()
        notes = make_report(
            run_dir,
            out,
            world,
            weights=None if is_whole_run else arguments.run,
            data=arguments.data,
            only_known=arguments.only_known,
            batch_size=arguments.batch_size,
            threads=arguments.threads,
        )
        if notes is not None and world.is_main:
            for note in notes:
                print(note, file=sys.stderr)
            if is_replaceable(out):
                escape_unencodable()
                shown = printable(arguments.out or run_dir / REPORT)
                print(f"{shown}, {out.stat().st_size / 1e6:.1f} MB, in {time.perf_counter() - began_at:.0f} s")

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
    config: RunConfig | None = None,
    weights: str | None = None,
    data: str | None = None,
    only_known: bool = False,
    batch_size: int | None = None,
    threads: int = 4,
    should_continue: Callable[[], bool] = lambda: True,
) -> list[str] | None:
    """Collective. Write the page of a run. Returns notes to print, on all ranks.

    config: of the run's newest start; None: config.yaml. weights: as ``open_network`` takes them; None: the run's.
    data: labelled images, as data.eval takes them; None: the run's evaluation set. only_known, batch_size, threads: as
    ``evaluate_classifier`` takes them. should_continue: asked on rank 0, now and then; after False nothing is written,
    and None is returned.

    A part that cannot be made says why in its place; the page is written as a whole or not at all. Raises RunError for
    ``weights`` and ``data`` that were given and cannot be used, OSError for a file that cannot be written.
    """
    folder = Path(os.path.abspath(run_dir))
    name = folder.name if folder.parent.name != TEACHERS else f"{folder.parents[1].name}, teacher {folder.name}"
    run = RunFolder(name, folder)
    run_on_all_ranks(world, lambda: _refuse_unwritable(out) if world.is_main else None)
    if broadcast(world, not should_continue()):
        return None

    def open_networks() -> RunNetworks:
        known = run_on_all_ranks(world, lambda: config or _known_config(run, weights))
        return open_run_networks(weights or str(run_dir), run.folder, known, world)

    # What was asked for has to be there; what belongs to the run may be gone since.
    networks = Part(open_networks()) if weights is not None else _part(open_networks)
    asked: Part[Survey | None] = Part(reason=networks.reason)
    if networks.value is not None:
        if broadcast(world, not should_continue()):
            return None
        ask = partial(
            ask_networks,
            networks.value,
            world,
            open_set=partial(_evaluation_set, run, config, data),
            data=data,
            only_known=only_known,
            batch_size=batch_size,
            threads=threads,
            should_continue=should_continue,
        )
        asked = Part(ask()) if data is not None else _part(ask)
        if broadcast(world, asked.value is None and not asked.reason):
            return None
    notes: list[str] = []

    def write() -> None:
        if not world.is_main:
            return
        try:
            content = _assemble(run, config, networks, asked, world, should_continue)
            write_output(out, render(content))
        except Exception as error:
            raise portable(error) from error
        notes.extend(_notes(networks, content))

    run_on_all_ranks(world, write)
    return broadcast(world, notes)


def _refuse_unwritable(out: Path) -> None:
    """Raise OSError where the file cannot be written, before images are asked about."""
    if out.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(out))
    if is_replaceable(out):
        with tempfile.TemporaryFile(dir=out.parent):
            pass


def _known_config(run: RunFolder, weights: str | None) -> RunConfig:
    """The run's configuration. Raises MissingInputError where there are no weights yet."""
    if weights is None and not (run.folder / STUDENT).exists() and not saved_steps(run.folder / CHECKPOINTS):
        raise MissingInputError("the student has no checkpoint yet")
    return run_config(run.folder)


def _evaluation_set(run: RunFolder, config: RunConfig | None, data: str | None) -> Source:
    if data is not None:
        return named_set(data)
    return evaluation_set((config or run_config(run.folder)).data, run_pixels(run.folder))


def _part(make: Callable[[], T]) -> Part[T]:
    """What a function returns, or why it cannot: whatever is wrong with one part, the others are still of use.

    Memory that is used up is raised: it has a way out.
    """
    try:
        return Part(make())
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return Part(reason=error_line(portable(error)))


def _notes(networks: Part[RunNetworks], content: Content) -> list[str]:
    said = [] if networks.value is None else list(networks.value.student.notes)
    if content.survey.value is None:
        said.append(f"without an evaluation: {content.survey.reason}")
    return [*said, *(f"without teacher {name}: {reason}" for name, reason in content.missing.items())]


def _assemble(
    run: RunFolder,
    given: RunConfig | None,
    networks: Part[RunNetworks],
    asked: Part[Survey | None],
    world: World,
    should_continue: Callable[[], bool],
) -> Content:
    """On rank 0. All that the page shows. should_continue: called between the parts, as a sign of life."""
    answers = asked.value
    worst, doubtful = ([], []) if answers is None else (worst_mistakes(answers), most_doubtful(answers))
    should_continue()
    config = Part(given) if given is not None else _part(lambda: run_config(run.folder))
    samples: Part[Sequence[pictures.TrainingSample]] = Part(reason=config.reason)
    plan: Part[list[tuple[str, str]]] = Part()
    if config.value is not None:
        samples = _part(partial(_training_samples, run, config.value, world))
        plan = _part(partial(_plan, run, config.value))
    should_continue()
    attention: Part[Sequence[pictures.AttendedImage]] = Part(reason=asked.reason)
    if answers is not None and networks.value is not None:
        attention = _part(partial(_attention, networks.value, answers, worst, world))
    should_continue()
    return Content(
        record=run_record(run, state_in_folder(run)),
        plan=plan.value or [],
        config_text=read_text(run.folder / CONFIG),
        histories={phase.name: read_history(phase) for phase in (run.student, *run.phases[:-1])},
        survey=asked,
        is_other_set=answers is not None and _part(partial(_is_other_set, run, answers)).value is True,
        is_training_set=answers is not None and config.value is not None and _is_training_set(answers, config.value),
        weights="" if networks.value is None else networks.value.student.weights,
        models={} if config.value is None else {name: each.model for name, each in config.value.teachers.items()},
        missing={} if networks.value is None else networks.value.missing,
        worst=worst,
        doubtful=doubtful,
        attention=attention,
        samples=samples,
        bad_images=_bad_images(run.folder, answers),
        made=f"Made by CiT-Scale {importlib.metadata.version('cit-scale')} on {as_date(time.time())}",
    )


def _is_other_set(run: RunFolder, answers: Survey) -> bool:
    """Whether the images are other ones than those that the run's results are about, as far as that is known."""
    noted, is_finished = noted_inputs(run.folder)
    if (
        answers.data != OWN_SET
        or not is_finished
        or EVALUATION_DATA not in noted
        or answers.source.classes != answers.classes
    ):
        return False
    return noted[EVALUATION_DATA] != noted_versions(run.folder).fingerprint(answers.source.fingerprint)


def _is_training_set(answers: Survey, config: RunConfig) -> bool:
    """Whether the images were named by the path of the training set, or by one above or below it."""
    if answers.data == OWN_SET or config.data.train is None:
        return False
    paths = [Path(os.path.realpath(each)) for each in (answers.data, config.data.train)]
    return paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0])


def _training_samples(run: RunFolder, config: RunConfig, world: World) -> Sequence[pictures.TrainingSample]:
    versions = noted_versions(run.folder)
    train_set, _ = open_sources(config.data, BY_VERSION[versions.pixels])
    noted, _ = noted_inputs(run.folder)
    if noted.get(DATA) not in (None, versions.fingerprint(train_set.fingerprint)):
        raise ConfigError(f"data.train={config.data.train} has other images than the run was trained on")
    return pictures.training_samples(train_set, config, versions, _first_ranks(run), world.device)


def _first_ranks(run: RunFolder) -> int:
    """Ranks of the student's first start; 1 where that was not noted."""
    first = run.student.starts[0] if run.student.starts else {}
    return max(1, int(number(first.get("world_size")) or 1))


def _plan(run: RunFolder, config: RunConfig) -> list[tuple[str, str]]:
    """What an update of the run is made of, at its first start."""
    ranks = _first_ranks(run)
    split = split_batch(config, ranks)
    micro_steps = counted(split.micro_steps, "micro-step")
    return [
        ("an update", f"{counted(ranks, 'rank')} x {micro_steps} x {split.micro_batch_size} images"),
        ("peak learning rate", f"{config.peak_lr:g}"),
    ]


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
    networks: RunNetworks, answers: Survey, worst: Sequence[Example], world: World
) -> Sequence[pictures.AttendedImage]:
    network = networks.student.network
    if transformer_of(network) is None:
        raise ConfigError(f"{network.architecture} is no vision transformer whose attention can be read")
    wrong = [example.place for example in worst[: ATTENDED // 2]]
    right = np.flatnonzero(answers.correct)
    # Spread over the data set, whose images stand class by class.
    spread = right[spread_places(len(right), ATTENDED - len(wrong))]
    places = [*spread.tolist(), *wrong]
    samples = [int(answers.samples[place]) for place in places]
    return pictures.attended_images(network, networks.student.interface, answers.source, samples, world.device)


def _bad_images(run_dir: Path, answers: Survey | None) -> list[tuple[str, str]]:
    """Of the run's list, and those that this page's survey met."""
    listed = (line.partition("\t") for line in read_text(run_dir / BAD_IMAGES).splitlines())
    found = {name: reason for name, _, reason in listed}
    return sorted({**found, **(answers.unusable if answers else {})}.items())
