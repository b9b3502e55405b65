"""What is known of a setting stands beside it, in one place, and everything else follows from that."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import pytest

from cit_scale import cli, config, settings
from cit_scale.config import RunConfig, TeacherConfig
from cit_scale.errors import ConfigError
from cit_scale.settings import (
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_RANGE,
    changed_settings,
    check_rules,
    check_values,
    flatten,
    inherit_from_student,
    listed_settings,
    section,
    sections_by_name,
    setting,
    to_dict,
    walk,
    with_defaults,
)


@dataclass(frozen=True)
class Wheels:
    size: float = setting(26.0, rules=[POSITIVE], in_listing=True)
    pressure: tuple[float, float] = setting((2.0, 3.0), rules=[POSITIVE_RANGE], may_change=True)
    studs: int | None = setting(None, rules=[NOT_NEGATIVE], for_teachers=False)


@dataclass(frozen=True)
class Rider:
    weight: float = setting(70.0, rules=[POSITIVE])
    bag: str | None = setting(None, may_change=True)


@dataclass(frozen=True)
class Bicycle:
    """A new setting is one line in a class like these; ``bell`` has nothing but a default."""

    name: str = setting("red", may_change=True)
    bell: str = "ding"
    wheels: Wheels = section(Wheels, for_teachers=True)
    riders: dict[str, Rider] = sections_by_name(Rider)


def test_a_value_that_breaks_a_rule_is_named_with_the_rule_wherever_it_stands():
    check_rules(Bicycle(riders={"ann": Rider()}))
    for broken, said in (
        (Bicycle(wheels=Wheels(size=0)), "wheels.size=0 must be above 0"),
        (Bicycle(wheels=Wheels(size=float("nan"))), "wheels.size=nan must be above 0"),
        (Bicycle(wheels=Wheels(pressure=(3, 2))), r"wheels.pressure=\[3, 2\] must be two numbers above 0"),
        (Bicycle(wheels=Wheels(studs=-1)), "wheels.studs=-1 must not be negative"),
        (Bicycle(riders={"ann": Rider(weight=0)}), "riders.ann.weight=0 must be above 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_rules(broken)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Bicycle(bell=None), "bell=null, and null is no value of this setting; leave it out for its default, ding"),
        (Bicycle(wheels=Wheels(pressure=None)), r"wheels.pressure=null, .* its default, \[2.0, 3.0\]"),
        (Bicycle(wheels=None), "wheels=null, and null is no value of this setting; leave it out for its default$"),
        (Bicycle(riders=None), "riders=null, "),
        (Bicycle(riders={"ann": Rider(weight=None)}), "riders.ann.weight=null, .* its default, 70.0"),
        (Bicycle(wheels=Wheels(size=float("inf"))), "wheels.size=inf: inf is not finite; "),
        (Bicycle(wheels=Wheels(pressure=(1.0, float("nan")))), r"wheels.pressure=\[1.0, nan\]: nan is not finite; "),
        (Bicycle(wheels=Wheels(studs=2**63)), "wheels.studs=9223372036854775808: .* more than 64 bits; "),
    ],
)
def test_what_only_the_type_rules_out_is_refused(config, said):
    with pytest.raises(ConfigError, match=said):
        check_values(config)


def test_null_is_a_value_where_the_type_says_so():
    check_values(Bicycle(wheels=Wheels(studs=None), riders={"ann": Rider(bag=None)}))


@pytest.mark.parametrize("value", [float("inf"), {"a": [1, float("nan")]}, {1: 2}, b"bytes", {"a": {"b": -(2**63)}}])
def test_free_arguments_are_what_json_knows(value):
    with pytest.raises(ConfigError, match=r"student\.kwargs="):
        check_values(config.StudentConfig(kwargs={"name": value}), "student.")
    check_values(config.StudentConfig(kwargs={"name": [None, True, 1, 1.0, "text", {"a": {}}]}), "student.")


def test_only_what_may_change_changes_when_a_run_goes_on():
    begun = Bicycle(riders={"ann": Rider()})
    free = Bicycle(name="blue", wheels=Wheels(pressure=(1.0, 2.0)), riders={"ann": Rider(bag="new")})
    assert changed_settings(to_dict(begun), free) == []
    other = Bicycle(bell="dong", wheels=Wheels(studs=4), riders={"ann": Rider(weight=60)})
    assert changed_settings(to_dict(begun), other) == [
        "bell: ding -> dong",
        "wheels.studs: None -> 4",
        "riders.ann.weight: 70.0 -> 60",
    ]


def test_a_teachers_run_takes_sections_and_settings_as_they_say():
    student = Bicycle(name="s", bell="s", wheels=Wheels(size=1.0, pressure=(1.0, 1.0), studs=9))
    taken = inherit_from_student(Bicycle(name="recipe", bell="recipe", wheels=Wheels(studs=3)), student)
    assert (taken.name, taken.bell) == ("recipe", "recipe")
    assert taken.wheels == Wheels(size=1.0, pressure=(1.0, 1.0), studs=3)


def test_a_listing_shows_what_says_so():
    assert listed_settings(Bicycle) == ["wheels.size"]


def test_what_an_earlier_version_did_not_write_is_at_its_default():
    assert with_defaults({"riders": {"ann": {}}}, Bicycle) == to_dict(Bicycle(riders={"ann": Rider()}))
    assert with_defaults({"riders": None, "extra": 1}, Bicycle) == {**to_dict(Bicycle()), "riders": None, "extra": 1}


def test_flattened_keys_are_dotted_and_an_empty_section_has_none():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "e": [1]}


def real_settings() -> dict[str, tuple[settings.Facts, Any]]:
    advised = RunConfig(teachers={"conv": TeacherConfig(model="resnet10t")})
    return {each.name: (each.facts, each.value) for each in walk(advised)}


def test_every_number_of_a_run_has_a_rule():
    numbers = {
        name: facts
        for name, (facts, value) in real_settings().items()
        if isinstance(value, (int, float, tuple)) and not isinstance(value, bool)
    }
    assert len(numbers) > 40
    assert [name for name, facts in numbers.items() if not facts.rules] == []
    optional = ("mixing.group_size", "optim.ema_decay", "train.micro_batch_size", "train.keep_every_steps")
    assert all(real_settings()[name][0].rules for name in optional)


def test_every_default_keeps_its_rules():
    config.check_config(RunConfig())


def test_the_facts_of_a_setting_stand_nowhere_else():
    """No other module has a list of settings by name: what it would say belongs beside the setting."""
    names = {name for name in real_settings() if "." in name and not name.startswith("teachers.")}
    listing = []
    for path in sorted(config.REPOSITORY.glob("cit_scale/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
                listed = [each.value for each in node.elts if isinstance(each, ast.Constant) and each.value in names]
                listing += [f"{path.name}:{node.lineno}: {listed}"] if len(listed) > 1 else []
    assert listing == []


def test_every_setting_says_what_it_means():
    silent = []
    for name, each in inspect.getmembers(config, dataclasses.is_dataclass):
        if name.endswith("Config"):
            body = ast.parse(inspect.getsource(each)).body[0].body
            for field, after in zip(body, [*body[1:], None], strict=True):
                is_setting = isinstance(field, ast.AnnAssign) and not ast.unparse(field.value or field).startswith(
                    "section("
                )
                if is_setting and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                    silent.append(f"{name}.{field.target.id}")
    assert silent == []


def test_a_recipe_that_is_written_and_read_is_the_same_configuration(tmp_path):
    advised = cli.parse_arguments(["--config", "cit_tiny"]).config
    (tmp_path / "again.yaml").write_text(settings.to_yaml(advised))
    assert cli.load_recipe(str(tmp_path / "again.yaml")) == advised
