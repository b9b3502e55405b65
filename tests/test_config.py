"""Recipes, overrides, refusals."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import yaml

from cit_scale import cli
from cit_scale.config import RunConfig, TeacherConfig, check_config, split_batch
from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError, RefusedError
from cit_scale.recipe import Given, recipe_names
from cit_scale.run.setup import set_aside
from cit_scale.settings import changed_settings, to_dict, to_yaml, with_defaults

NOTHING = Given((), frozenset())


def parse(*argv):
    return cli.parse_arguments(argv).config


def with_train(**changes):
    config = RunConfig()
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def test_the_default_recipe_is_digits():
    assert parse() == parse("--config", "digits")
    assert parse().data.train == "builtin:digits"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_survives_being_written_and_read(name, tmp_path):
    config = parse("--config", name)
    check_config(config)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert cli.load_recipe(str(tmp_path / "again.yaml")) == config


@pytest.mark.parametrize("name", ["cit_tiny", "cit_small", "cit_base"])
def test_the_student_recipes_hold_the_papers_numbers(name):
    config = parse("--config", name)
    assert config.student.name == f"{name}_patch16_224"
    assert {token: teacher.model for token, teacher in config.teachers.items()} == {
        "conv": "regnety_040",
        "inv": "rednet101",
    }
    assert [teacher.weight for teacher in config.teachers.values()] == [1.0, 1.0]
    assert config.distill.temperature == 1.0
    assert (config.train.epochs, config.train.global_batch_size) == (300, 1024)
    optim = config.optim
    assert (config.peak_lr, optim.warmup_lr, optim.min_lr, optim.warmup_epochs) == (1e-3, 1e-6, 1e-5, 20)
    assert (optim.betas, optim.eps, optim.weight_decay, optim.clip_norm) == ((0.9, 0.999), 1e-8, 0.05, 15.0)
    assert optim.ema_decay is None
    augment, mixing = config.augment, config.mixing
    assert (augment.policy, augment.erase_prob, augment.repeats) == ("rand-m9-mstd0.5-inc1", 0.25, 1)
    assert (augment.crop_scale, augment.flip_prob) == ((0.08, 1.0), 0.5)
    assert (mixing.mixup_alpha, mixing.cutmix_alpha, mixing.switch_prob, mixing.smoothing) == (0.8, 1.0, 0.5, 0.1)


def test_the_deit_preset_lies_over_a_student():
    config = parse("--config", "cit_small", "--config", "deit")
    assert config.student.name == "cit_small_patch16_224"
    assert config.student.kwargs == {"drop_path_rate": 0.1}
    assert (config.optim.ema_decay, config.optim.warmup_epochs, config.augment.repeats) == (0.99996, 5, 3)


def test_the_learning_rate_scales_with_the_global_batch():
    assert parse("--config", "cit_tiny", "--train.global_batch_size", "4096").peak_lr == pytest.approx(4e-3)


@pytest.mark.parametrize("argv", [["--name", "mine", "--config", "digits"], ["--name=mine", "--config=digits"]])
def test_an_option_overrides_a_recipe_also_where_it_stands_before_it(argv):
    assert cli.parse_arguments(argv).config.name == "mine"


def test_of_two_recipes_the_later_one_wins():
    assert cli.parse_arguments(["--config", "cit_base", "--seed", "3", "--config", "digits"]).config.name == "digits"


def test_a_shortened_setting_is_refused():
    with pytest.raises(ConfigError, match=r"did you mean train\.epochs"):
        cli.parse_arguments(["--train.epoch", "3"])


def test_dotted_overrides_reach_inside_teachers():
    config = parse("--config", "cit_base", "--teachers.conv.weight", "2", "--train.epochs=3")
    assert config.teachers["conv"].weight == 2.0
    assert config.teachers["inv"].weight == 1.0
    assert config.train.epochs == 3


def test_deepspeed_users_own_flags_choose_the_sharding_file():
    arguments = cli.parse_arguments(["--deepspeed", "--deepspeed_config", "mine.json", "--local_rank=3"])
    assert arguments.config.engine.ds_config == "mine.json"
    assert arguments.local_rank == 3


def test_going_on_with_the_same_settings_is_the_default():
    default = cli.parse_arguments([])
    assert (default.fresh, default.override_resume) == (False, False)
    assert cli.parse_arguments(["--fresh"]).fresh is True
    assert cli.parse_arguments(["--override-resume"]).override_resume is True


def test_a_teachers_run_takes_the_students_data_seed_and_folder():
    config = parse("--data.image_size", "48", "--seed", "7")
    run = cli.resolve_teacher_runs(config, NOTHING)["inv"].config
    assert run.data == config.data
    assert run.augment == config.augment
    assert run.seed == 7
    assert run.run_dir == config.run_dir / "teachers" / "inv"
    assert (run.student.name, run.student.kwargs) == ("rednet26", config.teachers["inv"].kwargs)
    assert run.teachers == {}


def test_a_teachers_recipe_that_has_teachers_is_refused():
    config = parse("--teachers.conv.recipe", "cit_tiny")
    with pytest.raises(ConfigError, match="the recipe of teacher conv has teachers itself; give one that has none"):
        cli.resolve_teacher_runs(config, NOTHING)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--config", "nope"], r"no recipe is called 'nope'.*cit_base.*digits"),
        (["--data.szie", "3"], r"--data\.szie"),
        (["--dta.image_size", "3"], r"did you mean data\.image_size\?"),
        (["--train.epohcs", "3"], r"did you mean train\.epochs\?"),
        (["--config", "cit_base", "--teachers.conv.wieght", "2"], r"did you mean teachers\.conv\.weight\?"),
        (["--seed", "x"], r"--seed='x' should be a valid integer"),
        (["--seed"], r"--seed: expected one argument"),
        (["--engine.precision", "half"], r"half.*float32.*bf16"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        cli.parse_arguments(argv)
    assert "\n" not in str(error.value)


def test_a_warm_up_that_there_is_not_has_no_learning_rate():
    check_config(parse("--optim.warmup_lr", "0.1", "--optim.warmup_epochs", "0"))


def test_null_in_a_recipe_is_refused_where_it_means_nothing(tmp_path):
    """The parser lets it in."""
    (tmp_path / "mine.yaml").write_text("optim: {lr: null, ema_decay: null}\n")
    with pytest.raises(ConfigError, match=r"optim\.lr=null, and null is no value of this setting"):
        parse("--config", str(tmp_path / "mine.yaml"))


def test_an_unknown_key_in_a_recipe_file_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {epohcs: 3}\n")
    with pytest.raises(ConfigError, match=r"epohcs.*did you mean train\.epochs"):
        parse("--config", str(tmp_path / "mine.yaml"))


def test_a_broken_recipe_file_is_one_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {epochs: 3\n")
    with pytest.raises(ConfigError) as error:
        parse("--config", str(tmp_path / "mine.yaml"))
    assert "\n" not in str(error.value)


def test_a_recipe_does_not_execute_what_it_contains(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "mine.yaml").write_text(f'name: !!python/object/apply:os.mkdir ["{mark}"]\n')
    with pytest.raises(ConfigError):
        parse("--config", str(tmp_path / "mine.yaml"))
    assert not os.path.exists(mark)


def test_differences_name_key_and_both_values():
    old = to_dict(parse())
    new = parse("--train.epochs", "3", "--teachers.conv.weight", "2")
    assert changed_settings(old, parse()) == []
    assert changed_settings(old, new) == [
        "teachers.conv.weight: 1.0 -> 2.0",
        f"train.epochs: {old['train']['epochs']} -> 3",
    ]


def test_files_may_move_and_what_is_learned_may_not_change():
    started_with = to_dict(parse("--teachers.conv.weights", "a.pth"))
    moved = parse("--teachers.conv.weights", "b.pth", "--data.train", "elsewhere", "--train.keep_last", "9")
    assert changed_settings(started_with, moved) == []
    other = parse("--teachers.conv.weights", "a.pth", "--teachers.conv.weight", "2", "--seed", "5")
    assert changed_settings(started_with, other) == ["seed: 0 -> 5", "teachers.conv.weight: 1.0 -> 2.0"]


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "expected"),
    [(1, None, (1024, 1)), (4, None, (256, 1)), (4, 64, (64, 4)), (2, 96, (64, 8)), (4, 4096, (256, 1))],
)
def test_micro_steps_follow_from_the_global_batch(world_size, micro_batch_size, expected):
    plan = split_batch(with_train(micro_batch_size=micro_batch_size), world_size)
    assert (plan.micro_batch_size, plan.micro_steps) == expected


@pytest.mark.parametrize(
    ("total", "world_size", "micro", "expected"),
    [
        (1024, 3, None, "does not give each of 3 ranks whole mixing groups .*; the nearest that do: 1008, 1032"),
        (1024, 256, None, "does not give each of 256 ranks whole mixing groups .*; the nearest that do: 2048"),
        (1024, 2, 4, "micro_batch_size=4 is less than one mixing group"),
    ],
)
def test_impossible_batches_are_refused_with_the_way_out(total, world_size, micro, expected):
    with pytest.raises(ConfigError, match=expected):
        split_batch(with_train(global_batch_size=total, micro_batch_size=micro), world_size)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--train.epochs", "0"], "train.epochs=0 must be above 0"),
        (["--optim.lr", ".nan"], "optim.lr=nan: nan is not finite"),
        (["--mixing.prob", "1.5"], r"mixing.prob=1.5 must be between 0 and 1"),
        (["--augment.crop_scale", "[0.5,0.1]"], "augment.crop_scale"),
        (["--optim.betas", "[0.9,1.0]"], "optim.betas"),
        (["--optim.ema_decay", "1"], "optim.ema_decay=1.0 must be from 0 to below 1"),
        (["--optim.lr", "1e-6"], "= 1e-06, below optim.min_lr=1e-05"),
        (["--optim.warmup_lr", "0.1"], "= 0.002, below optim.warmup_lr=0.1"),
        (["--seed", "100000000000000000000"], "seed=.* more than 64 bits"),
        (["--data.image_size", "1000000000"], "data.image_size=1000000000 must be at most 65535"),
        (["--data.decode_threads", "1000000000"], "data.decode_threads=1000000000 must be at most 1024"),
        (["--data.prefetch", "1000000000"], "data.prefetch=1000000000 must be at most 1024"),
        (["--train.step_timeout_s", ".inf"], "train.step_timeout_s"),
        (["--data.holdout", "1.5"], "data.holdout=1.5"),
        (["--train.epochs", "1"], "optim.warmup_epochs=.* is longer than train.epochs=1"),
    ],
)
def test_numbers_outside_their_range_are_refused(argv, expected):
    with pytest.raises(ConfigError, match=expected):
        check_config(parse(*argv))


@pytest.mark.parametrize(
    "name", ["", "/", "/pets", ".", "..", "../pets", "pets/../..", "./pets", "pets/.", "a\0b", "a\nb"]
)
def test_a_name_that_leads_out_of_the_folder_of_runs_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="does not name a folder inside another"):
        parse(f"--name={name}", "--fresh")
    (tmp_path / "advised.yaml").write_text(yaml.safe_dump({"teachers": {name: {"model": "resnet10t"}}}))
    with pytest.raises(ConfigError, match="does not name a folder inside another"):
        parse("--config", str(tmp_path / "advised.yaml"))


def test_a_name_in_no_encoding_is_refused():
    with pytest.raises(ConfigError, match="characters that cannot be printed"):
        parse("--name", os.fsdecode(b"\xff"))


@pytest.mark.parametrize("name", ["pets", "pets/large", "a.b", "..a", "pets-lr=0.1", "my run"])
def test_other_names_are_names(name):
    assert parse("--name", name).run_dir == Path("runs") / name


@pytest.mark.parametrize(
    "setting",
    [
        *("runs_dir", "data.train", "data.eval", "data.cache_dir", "augment.policy", "student.name", "student.weights"),
        *("engine.ds_config", "teachers.conv.weights", "teachers.conv.recipe"),
    ],
)
def test_a_text_that_was_left_empty_is_refused(setting):
    """As "$UNSET" leaves it."""
    with pytest.raises(ConfigError, match=f"{setting} is an empty text"):
        parse(f"--{setting}=")


@pytest.mark.parametrize("inside", ["ckpt", "teachers/conv", "tensorboard"])
def test_a_name_inside_another_runs_own_folders_is_refused(inside):
    with pytest.raises(ConfigError, match="lies inside another run's folder"):
        parse("--name", f"pets/{inside}")
    assert parse("--name", inside).name == inside


@pytest.mark.parametrize("setting", ["runs_dir", "data.train", "data.cache_dir", "config"])
def test_the_home_of_nobody_is_refused(setting):
    with pytest.raises(ConfigError, match=r"~nosuchuser/x: .*write the folder out"):
        parse(f"--{setting}=~nosuchuser/x")


def test_an_argument_of_timms_may_be_empty():
    assert parse("--student.kwargs.global_pool=").student.kwargs["global_pool"] == ""


@pytest.mark.parametrize("name", recipe_names())
def test_a_setting_that_an_earlier_version_did_not_know_was_at_its_default(name):
    config = parse("--config", name)
    known = without_defaults(to_dict(config), to_dict(RunConfig()))
    assert with_defaults(known, RunConfig) == to_dict(config)
    assert changed_settings(known, config) == []
    assert changed_settings({}, dataclasses.replace(RunConfig(), seed=7)) == ["seed: 0 -> 7"]


def without_defaults(tree, defaults):
    """As a version wrote it that knew none of the settings that are at their defaults."""
    kept = {}
    for key, value in tree.items():
        if key == "teachers":
            value = {name: without_defaults(teacher, TEACHER_DEFAULTS) for name, teacher in value.items()}
        elif isinstance(value, dict) and key != "kwargs":
            value = without_defaults(value, defaults[key])
        if value != defaults.get(key) and value != {}:
            kept[key] = value
    return kept


TEACHER_DEFAULTS = dataclasses.asdict(TeacherConfig(model=""))


def test_a_teacher_that_was_not_there_is_no_default():
    config = parse("--config", "cit_tiny")
    before = to_dict(dataclasses.replace(config, teachers={"inv": config.teachers["inv"]}))
    assert "teachers.conv.model: None -> regnety_040" in changed_settings(before, config)


def test_a_folder_with_other_runs_in_it_is_not_set_aside(tmp_path):
    for name in ("pets", "pets/teachers/conv", "pets/large", "pets/ckpt/step_000001"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    with pytest.raises(RefusedError, match=r"pets cannot be set aside: other runs lie in it .*pets/large"):
        set_aside(tmp_path / "pets", World())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.yaml").touch()
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match="group/linked"):
        set_aside(tmp_path / "group", World())
    shutil.rmtree(tmp_path / "group")
    shutil.rmtree(tmp_path / "elsewhere")
    set_aside(tmp_path / "pets" / "large", World())
    (tmp_path / "pets" / "large.1").rename(tmp_path / "large")
    set_aside(tmp_path / "pets", World())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "pets.1"]
