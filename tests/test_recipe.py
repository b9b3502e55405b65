"""Recipes and options: checked one by one, laid over one another, built."""

import os
import subprocess

import pytest

from cit_scale import cli, recipe
from cit_scale.config import RunConfig, StudentConfig, TeacherConfig
from cit_scale.errors import ConfigError
from cit_scale.recipe import build, lay_over, parse_option, parse_recipe


def parse(*argv):
    return cli.parse_arguments(argv).config


def tree(text):
    return parse_recipe(text.encode(), "mine.yaml")


def laid(*texts):
    merged = {}
    for text in texts:
        merged = lay_over(merged, tree(text))
    return build(merged, RunConfig)


# --- One file ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "mine.yaml holds no settings; write some"),
        ("# a comment", "mine.yaml holds no settings"),
        ("5", "mine.yaml holds 5, and no settings"),
        ("[1, 2]", r"mine.yaml holds \[1, 2\], and no settings"),
        ("train: {epochs: 3", "mine.yaml: "),
        ("a: 1\n---\nb: 2\n", "mine.yaml, line 2: .*another document"),
        ("name: !!python/name:os.system", "mine.yaml: could not determine a constructor"),
        ("train:\n  epochs: 3\n  keep_last: 1\n  epochs: 4\n", "mine.yaml, line 4: the key 'epochs' stands twice"),
        ("student: {kwargs: {depth: 1, depth: 2}}", "the key 'depth' stands twice"),
        ("train: {epochs: 3}\ntrain.epochs: 4\n", "mine.yaml: train.epochs is given twice"),
        ("engine:\nname: x\n", "mine.yaml: engine has nothing below it, but it is a section"),
        ("engine: 1", "mine.yaml: engine is given as 1, but it is a section"),
        ("engine: [zero]", r"mine.yaml: engine is given as \['zero'\], but it is a section"),
        ("teachers: {conv: 3}", "mine.yaml: teachers.conv is given as 3, but it is a section"),
        ("teachers: 0", "mine.yaml: teachers is given as 0, but it is a section"),
        ("teachers: {conv: ''}", "mine.yaml: teachers.conv is given as '', but it is a section"),
        ("teachers: conv", "mine.yaml: teachers is given as 'conv', but it is a section"),
        ("teachers: {1: {model: a}}", "mine.yaml: teachers.1: YAML takes this key for a int; write it in quotes"),
        ("teachers: {on: {model: a}}", "mine.yaml: teachers.True: YAML takes this key for a bool"),
        ("name: 12", "mine.yaml: name=12 should be a text; write it in quotes"),
        ("data: {eval: true}", "mine.yaml: data.eval=True should be a text; write it in quotes"),
        ("seed: true", "mine.yaml: seed=True should be a valid integer"),
        ("seed: 1.5", "mine.yaml: seed=1.5 should be a valid integer"),
        ("optim: {lr: fast}", "mine.yaml: optim.lr='fast' should be a valid number"),
        ("engine: {compile: 1}", "mine.yaml: engine.compile=1 should be a valid boolean or 'auto'"),
        ("engine: {name: zer}", "mine.yaml: engine.name='zer' should be 'zero', 'fsdp2' or 'plain'"),
        ("augment: {crop_scale: [0.1]}", r"mine.yaml: augment.crop_scale=\[0.1\] should be a list of 2 numbers"),
        ("augment: {crop_scale: 0.1}", "mine.yaml: augment.crop_scale=0.1 should be a list of 2 numbers"),
        ("student: {kwargs: 3}", "mine.yaml: student.kwargs=3 should be a valid dictionary"),
        ("? [a, b]\n: 3", "mine.yaml, line 1: a key has to be a text"),
        ("student: &s {kwargs: *s}", "mine.yaml is not YAML: Circular"),
        ("teachers:\n# conv: {}\nseed: 3", "mine.yaml: teachers: nothing stands below it"),
        ("student:\n  kwargs:\n", "mine.yaml: student.kwargs: nothing stands below it"),
        ("teachers: {conv: }", "mine.yaml: teachers.conv has nothing below it, but it is a section"),
        ("student: null", "mine.yaml: student is null, but it is a section"),
        ("fresh: true", "mine.yaml: fresh: this is an option of the command line, not a setting"),
        ("override-resume: true", "mine.yaml: override-resume: this is an option of the command line"),
        ("config: digits", "mine.yaml: config: this is an option of the command line"),
        ("epohcs: 3", r"mine.yaml: epohcs: there is no such setting; did you mean train\.epochs\?"),
        ("image_size: 3", r"did you mean student\.image_size or data\.image_size\?"),
        ("crop_ratio: 1", r"did you mean data\.crop_ratio or augment\.crop_ratio\?"),
        ("teachers: {conv: {weigths: a}}", r"teachers\.conv\.weigths: .*; did you mean teachers\.conv\.weights\?"),
        ("dta: {image_size: 3}", r"dta\.image_size: there is no such setting; did you mean data\.image_size\?"),
        ("engine: {compile: !!bool maybe}", "mine.yaml is not YAML: "),
        ("student: !!map [1]", "mine.yaml"),
        ("a: &a {seed: 1}\nb: &b {seed: 2}\ntrain:\n  <<: *a\n  <<: *b", "line 5: the key '<<' stands twice"),
        ("? \n: 1", "line 1: a key has to be a text"),
        ("optim:\n  ema_decay:\n", r"mine.yaml: optim\.ema_decay has no value; leave it out, or write null"),
        ("student: {kwargs: {a: {b: [1, ]}, c: }}", r"student\.kwargs\.c has no value"),
        ("zzzzz: 3", "zzzzz: there is no such setting; see --help-all"),
    ],
)
def test_a_recipe_that_is_wrong_is_one_line_with_its_file(text, said):
    with pytest.raises(ConfigError, match=said) as error:
        tree(text)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_named_with_their_file():
    with pytest.raises(ConfigError, match=r"mine\.yaml is not a text in UTF-8"):
        parse_recipe(b"\xff\xfe", "mine.yaml")
    assert parse_recipe(b"\xef\xbb\xbfseed: 3", "mine.yaml") == {"seed": 3}  # an editor's mark at the beginning


def test_values_have_the_types_of_their_settings():
    read = tree(
        "name: 2001-01-01\nseed: '3'\noptim: {lr: 1e-3, warmup_epochs: 2, betas: [0, 0.9]}\n"
        "data: {eval: 'null'}\nmixing: {group_size: null}\n"
    )
    assert read == {
        "name": "2001-01-01",
        "seed": 3,
        "optim": {"lr": 0.001, "warmup_epochs": 2.0, "betas": (0.0, 0.9)},
        "data": {"eval": None},
        "mixing": {"group_size": None},
    }
    assert isinstance(read["optim"]["warmup_epochs"], float)


def test_free_arguments_have_the_types_that_the_file_gives_them():
    given = tree("student: {kwargs: {a: 1e-3, b: '3', c: [1, 2], d: {e: true}, f: 2001-01-01, g: .5e3}}")
    kwargs = {"a": 0.001, "b": "3", "c": [1, 2], "d": {"e": True}, "f": "2001-01-01", "g": 500.0}
    assert given == {"student": {"kwargs": kwargs}}


def test_a_dotted_name_is_a_place_in_the_sections():
    assert tree("train.epochs: 3\ntrain: {keep_last: 1}\n") == {"train": {"epochs": 3, "keep_last": 1}}
    assert tree("student.kwargs.a.b: 3") == {"student": {"kwargs": {"a": {"b": 3}}}}


def test_yamls_own_merging_is_no_key_given_twice():
    text = "teachers:\n  a: &a {model: x, weight: 2}\n  b: &b {<<: *a, weight: 3}\n  c: {<<: *b, model: z}\n"
    read = tree(text)["teachers"]
    assert read == {
        "a": {"model": "x", "weight": 2.0},
        "b": {"model": "x", "weight": 3.0},
        "c": {"model": "z", "weight": 3.0},
    }


# --- One over the other ---


def test_a_later_recipe_that_names_one_teacher_keeps_the_others():
    both = "teachers: {conv: {model: a, weights: a.pth}, inv: {model: b, weights: b.pth}}"
    merged = laid(both, "teachers: {conv: {weight: 2}}")
    assert merged.teachers == {
        "conv": TeacherConfig("a", weights="a.pth", weight=2.0),
        "inv": TeacherConfig("b", weights="b.pth"),
    }


def test_digits_under_the_deit_preset_keeps_its_network():
    merged = parse("--config", "digits", "--config", "deit")
    assert merged.student.kwargs == {**parse("--config", "digits").student.kwargs, "drop_path_rate": 0.1}
    assert merged.teachers == parse("--config", "digits").teachers


def test_free_arguments_are_merged_key_by_key_at_any_depth():
    first = "student: {kwargs: {a: 1, b: {c: 2, d: 3}, e: 4}}"
    assert laid(first, "student: {kwargs: {b: {c: 5}, f: 6}}").student.kwargs == {
        "a": 1, "b": {"c": 5, "d": 3}, "e": 4, "f": 6,
    }  # fmt: skip
    assert laid(first, "student: {kwargs: {b: 7}}").student.kwargs == {"a": 1, "b": 7, "e": 4}
    assert laid(first, "student: {kwargs: {b: 7}}", first).student.kwargs["b"] == {"c": 2, "d": 3}


def test_null_removes():
    first = "student: {kwargs: {a: 1, b: {c: 2, d: 3}}}\nteachers: {conv: {model: a}, inv: {model: b}}\n"
    assert laid(first, "student: {kwargs: {a: null, b: {c: null}, z: null}}").student.kwargs == {"b": {"d": 3}}
    assert laid(first, "student: {kwargs: null}").student.kwargs == {}
    assert list(laid(first, "teachers: {conv: null}").teachers) == ["inv"]
    assert laid(first, "teachers: null").teachers == {}
    assert laid("student: {kwargs: {a: null}}").student.kwargs == {}
    with pytest.raises(ConfigError, match=r"teachers\.cnv=null, but there is none to remove; there are: conv, inv"):
        laid(first, "teachers: {cnv: null}")


def test_an_empty_dictionary_over_a_full_one_is_refused():
    first = "student: {kwargs: {a: 1}}\nteachers: {conv: {model: a}}\n"
    for second in ("teachers: {}", "student: {kwargs: {}}"):
        with pytest.raises(ConfigError, match=r"adds nothing to .*; leave it out, or give null to remove all"):
            laid(first, second)
    assert laid("teachers: {}\nstudent: {kwargs: {}}").teachers == {}


def test_where_a_later_recipe_names_another_network_what_belonged_to_the_earlier_is_dropped():
    first = (
        "student: {name: a, kwargs: {x: 1}, weights: a.pth}\n"
        "teachers: {conv: {model: a, kwargs: {x: 1}, weights: a.pth, recipe: r, weight: 2}}\n"
    )
    other = laid(first, "student: {name: b}\nteachers: {conv: {model: b, kwargs: {y: 1}}}")
    assert other.student == StudentConfig("b")
    assert other.teachers["conv"] == TeacherConfig("b", {"y": 1}, weight=2.0)
    same = laid(first, "student: {name: a}\nteachers: {conv: {model: a}}")
    assert same == laid(first)
    assert laid("student: {kwargs: {x: 1}}", "student: {name: b}").student.kwargs == {"x": 1}  # of no network yet


def test_digits_teachers_are_not_given_to_the_paper_s_recipe():
    over = parse("--config", "digits", "--config", "cit_small")
    assert over.teachers == parse("--config", "cit_small").teachers
    assert over.student == parse("--config", "cit_small").student


def test_a_recipe_may_come_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", 'echo "seed: 5" > "$0"', str(tmp_path / "pipe")])
    assert parse("--config", str(tmp_path / "pipe")).seed == 5
    writer.wait()
    with pytest.raises(ConfigError, match="no recipe is called"):
        parse("--config", str(tmp_path))


# --- Options ---


def test_options_are_laid_over_the_recipes_like_a_last_one():
    config = parse("--teachers.conv.weights", "a.pth", "--student.kwargs.depth=3", "--teachers.inv", "null")
    digits = parse()
    assert config.student.kwargs == {**digits.student.kwargs, "depth": 3}
    assert list(config.teachers) == ["conv"]
    assert config.teachers["conv"].weights == "a.pth"
    assert parse("--teachers", "null").teachers == {}
    assert parse("--student.kwargs", "{depth: 3}").student.kwargs == config.student.kwargs
    assert parse("--student.kwargs=null", "--student.kwargs.depth=3").student.kwargs == {"depth": 3}
    assert parse("--optim", "{lr: 1, eps: 1e-3}").optim.eps == 0.001


def test_another_network_on_the_command_line_drops_the_recipe_s_arguments_and_keeps_those_typed_beside_it():
    for argv in (
        ["--student.kwargs.depth=3", "--student.name=x"],
        ["--student.name=x", "--student.kwargs.depth=3"],
        ["--student.kwargs.depth=3", "--student={name: x}"],
    ):
        assert parse(*argv).student == StudentConfig("x", {"depth": 3})
    assert parse("--teachers.conv.model=x").teachers["conv"] == TeacherConfig("x")
    both = parse("--teachers.conv.weights=a.pth", "--teachers={conv: {model: x}}")
    assert both.teachers["conv"] == TeacherConfig("x", weights="a.pth")


def test_options_are_laid_over_one_another_in_the_order_in_which_they_are_typed():
    conv = TeacherConfig("x", weights="f")
    assert parse("--teachers=null", "--teachers.conv={model: x, weights: f}").teachers == {"conv": conv}
    assert parse("--teachers=null", "--teachers.conv.model=x", "--teachers.conv.weights=f").teachers == {"conv": conv}
    assert parse("--teachers.conv=null", "--teachers.conv={model: x, weights: f}").teachers["conv"] == conv
    assert list(parse("--teachers.conv={model: x, weights: f}", "--teachers=null").teachers) == []
    typed = parse("--student.kwargs=null", "--student={name: x, kwargs: {depth: 1}}")
    assert typed.student == StudentConfig("x", {"depth": 1})
    assert parse("--student.name=x", f"--student.name={parse().student.name}").student == parse().student


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "0x10", 16),
        ("seed", "0o17", 15),
        ("seed", "010", 10),
        ("seed", "1_000", 1000),
        ("optim.lr", "1e-3", 0.001),
        ("engine.compile", "yes", True),
        ("name", "12", "12"),
        ("name", "null", "null"),
        ("data.eval", "null", None),
        ("mixing.group_size", "null", None),
        ("augment.crop_scale", "[0.1, 1]", (0.1, 1.0)),
        ("student.kwargs.a", "1e-3", 0.001),
        ("student.kwargs.a", "", ""),
        ("student.kwargs.a.b", "[1, x]", [1, "x"]),
    ],
)
def test_a_typed_text_has_the_type_of_its_setting(name, text, value):
    found = parse_option(name, text)
    for part in name.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seed="], "--seed is empty; give a value or leave it out"),
        (["--teachers="], "--teachers is empty; give a value or leave it out"),
        (["--student.kwargs="], "--student.kwargs is empty; give a value or leave it out"),
        (["--seed=x"], "--seed='x' should be a valid integer"),
        (["--dta.image_size=3"], "--dta.image_size: there is no such setting; did you mean data.image_size?"),
        (["--engine", "1"], "--engine is given as 1, but it is a section"),
        (["--student.kwargs.a", "["], "--student.kwargs.a: "),
        (["--seed", "--name", "x"], "--seed: expected one argument"),
        (["--nosuch"], "--nosuch: there is no such setting"),
        (["--teacher.conv.weights=x"], "did you mean teachers.conv.weights?"),
        (["--studnt.kwargs.depth=3"], "did you mean student.kwargs.depth?"),
        (["--batch_size=3"], "did you mean optim.lr_batch_size or train.global_batch_size or train.micro_batch_size?"),
        (["--seed=1:30"], "--seed='1:30' should be a valid integer"),
        (["--train.epoch", "--fresh"], "--train.epoch: there is no such setting; did you mean train.epochs?"),
        (["--train.epochs"], "--train.epochs: expected one argument"),
        (["seed=3"], "unrecognized argument 'seed=3'; settings are given as --NAME VALUE"),
        (["-seed", "3"], "unrecognized argument '-seed'"),
        (["--frseh"], "there is no option --frseh; did you mean --fresh?"),
        (["--fresh=3"], "--fresh: ignored explicit argument '3'"),
        (["--config"], "--config: expected one argument"),
        (["--local_rank", "x"], "--local_rank: invalid int value: 'x'"),
        (["--teachers.swin.weights=x"], "teachers.swin.model is missing; give it beside the other settings"),
    ],
)
def test_a_command_line_that_is_wrong_is_one_line(argv, said):
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_options_of_the_command_line_are_no_settings():
    assert not recipe.OPTIONS.keys() & RunConfig.__dataclass_fields__.keys()
