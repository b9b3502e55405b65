"""A run that has begun goes on with what it began with, whatever is shipped by then, and however auto is decided."""

import dataclasses
import json

import pytest
import torch
import yaml

from cit_scale import cli, recipe
from cit_scale.config import RunConfig
from cit_scale.distributed.world import World
from cit_scale.engines.base import EngineSetup
from cit_scale.errors import RefusedError
from cit_scale.recipe import Given
from cit_scale.run import auto
from cit_scale.run.auto import with_precision
from cit_scale.run.begun import GIVEN, as_begun, given_note
from cit_scale.run.plan import arithmetic_text
from cit_scale.settings import changed_settings, to_dict, to_yaml


def begin(arguments):
    """Leave what a first start leaves in the run folder."""
    config = arguments.config
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    (config.run_dir / "env.json").write_text(json.dumps([given_note(arguments.given)]))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of shipped recipes; returns a function that writes one."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(recipe, "RECIPES", folder)

    def write(name="mine", **settings):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))

    write()
    return write


@pytest.fixture
def parse(tmp_path, shipped):
    def parse(*argv):
        return cli.parse_arguments(["--config", "mine", "--runs_dir", str(tmp_path / "runs"), *argv])

    return parse


def test_what_was_given_is_known_from_the_command_line_and_from_own_recipes(parse, shipped, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("optim: {lr: 1e-4}\nstudent.kwargs: {depth: 2}")
    given = parse("--config", str(own), "--train.epochs", "3").given
    assert given.recipes == ("mine",)
    assert given.settings == {"runs_dir", "train.epochs", "optim.lr", "student.kwargs.depth"}
    assert given.has("student.kwargs")
    assert given.has("optim.lr")
    assert not given.has("optim.lr_batch_size")
    assert Given((), frozenset({"teachers"})).has("teachers.conv.model"), "a section that was given as a whole"


def test_a_shipped_value_that_has_changed_is_no_difference(parse, shipped):
    shipped(optim={"lr": 1e-3}, student={"kwargs": {"depth": 2}})
    begun = parse("--train.epochs", "7")
    begin(begun)
    shipped(optim={"lr": 5e-4}, student={"kwargs": {"depth": 3}}, augment={"repeats": 3})
    now = parse("--train.epochs", "7")
    assert changed_settings(to_dict(begun.config), now.config), "or there is nothing to test"
    assert now.as_begun().config == begun.config


def test_a_default_that_has_changed_is_no_difference(parse, shipped):
    begun = parse()
    begin(begun)
    changed = dataclasses.replace(
        begun.config,
        engine=dataclasses.replace(begun.config.engine, batch_norm="synchronized"),
        data=dataclasses.replace(begun.config.data, prefetch=7),
    )
    assert as_begun(changed, begun.given) == begun.config


def test_what_the_user_gives_or_gave_is_compared(parse, shipped):
    begin(parse("--optim.lr", "1e-4"))
    for argv, lr in (((), 1e-3), (("--optim.lr", "2e-4"), 2e-4)):
        assert parse(*argv).as_begun().config.optim.lr == lr
    assert parse("--seed", "3").as_begun().config.seed == 3


def test_another_shipped_recipe_is_the_users_choice(parse, shipped):
    shipped(optim={"lr": 1e-3})
    begin(parse())
    shipped("other", optim={"lr": 5e-4})
    assert parse("--config", "other").as_begun().config.optim.lr == 5e-4


def test_auto_is_what_it_was_decided_to_be(parse, shipped):
    begun = parse()
    assert begun.config.engine.compile == begun.config.distill.compile == "auto"
    engine = dataclasses.replace(begun.config.engine, compile=True, precision="bf16")
    begin(dataclasses.replace(begun, config=dataclasses.replace(begun.config, engine=engine)))
    again = parse("--engine.compile", "auto", "--engine.precision", "auto").as_begun().config.engine
    assert (again.compile, again.precision) == (True, "bf16")
    assert parse("--engine.compile", "false").as_begun().config.engine.compile is False


def test_a_run_of_before_the_notes_keeps_what_auto_stood_for_and_no_more(parse, shipped):
    begun = parse()
    engine = dataclasses.replace(begun.config.engine, compile=False)
    optim = dataclasses.replace(begun.config.optim, lr=7e-4)
    begin(dataclasses.replace(begun, config=dataclasses.replace(begun.config, engine=engine, optim=optim)))
    (begun.config.run_dir / "env.json").write_text(json.dumps([{"command": "..."}]))
    again = parse().as_begun().config
    assert again.engine.compile is False
    assert again.optim.lr == begun.config.optim.lr


TAUGHT = {"teachers": {"conv": {"model": "regnety_004", "recipe": "theirs"}}}


def begin_teacher(arguments, **engine):
    """Leave what the start of its run leaves in the teacher's folder, by what ``auto`` was decided to be."""
    run = arguments.teacher_runs["conv"]
    config = dataclasses.replace(run.config, engine=dataclasses.replace(run.config.engine, **engine))
    begin(dataclasses.replace(arguments, config=config, given=run.given))
    return config


def test_a_teachers_run_keeps_its_own_where_the_students_has_not_begun(parse, shipped):
    """What comes from the student's run is no more given than it was there, nor is the teacher's model."""
    shipped("theirs", optim={"lr": 1e-3})
    shipped(**TAUGHT)
    begun = begin_teacher(parse("--data.prefetch", "3"), compile=True)
    shipped("theirs", optim={"lr": 5e-4})
    shipped(teachers={"conv": {"model": "regnety_006", "recipe": "theirs"}}, engine={"batch_norm": "synchronized"})
    again = parse("--data.prefetch", "3").as_begun().teacher_runs["conv"].config
    assert again == begun
    assert parse("--engine.batch_norm", "synchronized").as_begun().teacher_runs["conv"].config.engine.batch_norm == (
        "synchronized"
    )


def test_a_teachers_run_keeps_what_it_decided_where_the_student_decided_otherwise(parse, shipped):
    """On another machine, or by another version: one that knew neither auto nor the notes."""
    shipped("theirs")
    shipped(**TAUGHT)
    begun = begin_teacher(parse(), compile=True)
    student = parse()
    engine = dataclasses.replace(student.config.engine, compile=False)
    (student.config.run_dir / "config.yaml").write_text(to_yaml(dataclasses.replace(student.config, engine=engine)))
    again = parse().as_begun()
    assert again.config.engine.compile is False
    assert again.teacher_runs["conv"].config == begun
    (begun.run_dir / "env.json").unlink()
    assert parse().as_begun().teacher_runs["conv"].config == begun


@pytest.mark.parametrize("damage", ["", "- 1", "{", "engine: 3"])
def test_damage_is_left_to_who_compares(damage, parse, shipped):
    begun = parse()
    begin(begun)
    (begun.config.run_dir / "config.yaml").write_text(damage)
    assert parse().as_begun().config == begun.config
    (begun.config.run_dir / "env.json").write_text(damage)
    assert parse().as_begun().config == begun.config


@pytest.mark.parametrize("damage", ["engine: {compile: 3}", "engine: {precision: fp8}", "engine: {compile: .nan}"])
def test_a_value_that_no_run_can_have_is_refused_with_the_way_out(damage, parse, shipped):
    begun = parse()
    begin(begun)
    (begun.config.run_dir / "config.yaml").write_text(damage)
    with pytest.raises(RefusedError, match=r"holds settings that .*engine.*; mend them, or start over"):
        parse().as_begun()


def test_without_config_yaml_the_newest_checkpoint_tells(parse, shipped):
    begun = parse()
    folder = begun.config.run_dir / "ckpt" / "step_000004"
    folder.mkdir(parents=True)
    engine = dataclasses.replace(begun.config.engine, compile=True)
    config = dataclasses.replace(begun.config, engine=engine)
    (folder / "meta.json").write_text(json.dumps({"inputs": {}, "config": to_dict(config)}))
    assert parse().as_begun().config.engine.compile is True


@pytest.mark.parametrize("bf16", [True, False])
def test_auto_precision_is_bf16_where_a_gpu_has_it(bf16):
    for name in ("cit_tiny", "cit_small", "cit_base"):
        config = cli.load_recipe(name)
        assert config.engine.precision == config.distill.teacher_precision == "auto"
        decided = with_precision(config, bf16=bf16)
        expected = "bf16" if bf16 else "float32"
        assert (decided.engine.precision, decided.distill.teacher_precision) == (expected, expected)
    assert with_precision(RunConfig(), bf16=bf16) == RunConfig()


class AloneOnAGpu(World):
    device = torch.device("cuda")


@dataclasses.dataclass
class Planned:
    """What is asked of a PreparedRun on a GPU."""

    config: RunConfig
    engine_setup: EngineSetup
    teacher_runs: dict = dataclasses.field(default_factory=dict)
    world: World = dataclasses.field(default_factory=AloneOnAGpu)


def planned_at(stage):
    ds_config = None if stage is None else {"zero_optimization": {"stage": stage}}
    return Planned(cli.load_recipe("cit_tiny"), EngineSetup(None, None, None, None, ds_config))


@pytest.mark.parametrize(("stage", "compiles"), [(None, True), (0, True), (1, True), (2, True), (3, False)])
def test_on_a_gpu_the_student_is_compiled_but_at_stage_3(stage, compiles, monkeypatch):
    for lacking, able in ((None, True), ("needs a C compiler", False)):
        monkeypatch.setattr(auto, "compiler_lacks", lambda *_, lacking=lacking: lacking)
        decided = auto.with_compile(planned_at(stage)).config
        assert (decided.engine.compile, decided.distill.compile) == (compiles and able, able)


def test_the_line_on_the_arithmetic_says_where_cuda_graphs_are_without_effect(monkeypatch):
    monkeypatch.setattr(auto, "compiler_lacks", lambda *_: None)
    planned = planned_at(1)
    distill = dataclasses.replace(planned.config.distill, cuda_graphs=True)
    planned = dataclasses.replace(planned, config=dataclasses.replace(planned.config, distill=distill))
    planned = dataclasses.replace(auto.with_compile(planned), engine_setup=planned.engine_setup)
    assert "student and teachers compiled, in CUDA graphs, under ZeRO stage 1" in arithmetic_text(planned, "an H100")
    eager = dataclasses.replace(planned.config, distill=dataclasses.replace(planned.config.distill, compile=False))
    said = arithmetic_text(dataclasses.replace(planned, config=eager), "an H100")
    assert "student compiled, without CUDA graphs, which are of compiled teachers on a GPU, under ZeRO" in said


def test_one_node_without_a_compiler_decides_for_all(monkeypatch):
    """Its rank would fail in its first step, and the others would wait for it."""
    monkeypatch.setattr(auto, "compiler_lacks", lambda *_: None)
    monkeypatch.setattr(auto, "gather", lambda world, able: [able, False])
    decided = auto.with_compile(planned_at(1)).config
    assert (decided.engine.compile, decided.distill.compile) == (False, False)


def test_a_start_writes_what_auto_stands_for_and_a_later_one_keeps_it(tiny_run, tmp_path):
    """Through the whole command: decided, noted, and kept where it would be decided otherwise."""
    run = dataclasses.replace(tiny_run, layout="plain", more=("--distill.compile", "auto", "--train.epochs", "1"))
    assert run.run(sabotage=(decide_teachers, True)).code == 0
    noted = yaml.safe_load((run.run_dir / "config.yaml").read_text())
    assert noted["distill"]["compile"] is True
    assert noted["engine"]["compile"] is False
    start = json.loads((run.run_dir / "env.json").read_text())[0]
    assert {"distill.compile", "train.epochs", "optim.lr"} <= set(start[GIVEN]["settings"])
    ended = run.run("--train.epochs", "2", "--override-resume", sabotage=(decide_teachers, False))
    assert ended.code == 0, ended.output
    assert yaml.safe_load((run.run_dir / "config.yaml").read_text())["distill"]["compile"] is True
    assert "teachers compiled" in ended.outputs[0]


def decide_teachers(world, compiles):
    auto._compiles_teachers = lambda prepared: compiles
