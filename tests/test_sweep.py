"""Which runs a sweep is, and what they are called."""

import pytest

from cit_scale import cli
from cit_scale.errors import ConfigError
from cit_scale.settings import flatten, to_dict
from launchers.sweep import full_name, split_values, sweep

CONFIG = cli.parse_arguments(["--config", "cit_base"]).config
KNOWN = list(flatten(to_dict(CONFIG)))


def test_a_sweep_is_every_combination_each_under_a_name_of_its_own():
    assert sweep(CONFIG, ["lr=0.001,2e-3", "seed=0,1"]) == [
        ["--optim.lr=0.001", "--seed=0", "--name=cit_base-lr=0.001-seed=0"],
        ["--optim.lr=0.001", "--seed=1", "--name=cit_base-lr=0.001-seed=1"],
        ["--optim.lr=2e-3", "--seed=0", "--name=cit_base-lr=2e-3-seed=0"],
        ["--optim.lr=2e-3", "--seed=1", "--name=cit_base-lr=2e-3-seed=1"],
    ]


def test_settings_that_end_alike_keep_their_full_names():
    (run,) = sweep(CONFIG, ["conv.weight=2", "teachers.inv.weight=3"])
    assert run[-1] == "--name=cit_base-teachers.conv.weight=2-teachers.inv.weight=3"


def test_a_name_holds_nothing_that_a_path_or_a_shell_would_mind():
    runs = sweep(CONFIG, ["betas=[0.9,0.99],[0.9, 0.95]", "ds_config=zero1,/my files/z.json"])
    assert [run[-1].removeprefix("--name=cit_base-") for run in runs[:2]] == [
        "betas=_0.9,0.99_-ds_config=zero1",
        "betas=_0.9,0.99_-ds_config=_my_files_z.json",
    ]
    assert runs[2][0] == "--optim.betas=[0.9, 0.95]"


def test_what_a_sweep_says_is_a_valid_run():
    for run in sweep(CONFIG, ["lr=0.001,0.002", "betas=[0.9,0.99]", "activation_checkpointing=true,false"]):
        config = cli.parse_arguments(["--config", "cit_base", *run]).config
        assert config.name.startswith("cit_base-lr=0.00")
        assert config.optim.betas == (0.9, 0.99)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("optim.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("seed", "seed"),
        ("conv.model", "teachers.conv.model"),
        ("student.kwargs.drop_path_rate", "student.kwargs.drop_path_rate"),
    ],
)
def test_a_setting_goes_by_its_name_or_by_how_it_ends(typed, expected):
    assert full_name(typed, KNOWN) == expected


def test_values_are_cut_outside_of_brackets():
    assert split_values("1,2") == ["1", "2"]
    assert split_values("[1,2],[3,[4,5]]") == ["[1,2]", "[3,[4,5]]"]
    assert split_values('{"a":1,"b":2}') == ['{"a":1,"b":2}']


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (["weight=1"], r"--sweep weight may be any of teachers.conv.weight, teachers.inv.weight; write one"),
        (["lrr=1"], r"--sweep lrr: there is no such setting; near it: optim.lr"),
        (["xyzzy=1"], r"--sweep xyzzy: there is no such setting; see --help"),
        (["name=a,b"], r"--sweep name: what each run is called follows"),
        (["lr"], r"--sweep lr gives no values, or an empty one; write --sweep lr=V1,V2"),
        (["lr=1,"], r"gives no values, or an empty one"),
        (["lr=1", "optim.lr=2"], r"--sweep names optim.lr twice"),
        (["lr=1,1"], r"two runs the name cit_base-lr=1; give each value once"),
    ],
)
def test_a_mistake_is_told_with_the_candidates(axes, expected):
    with pytest.raises(ConfigError, match=expected):
        sweep(CONFIG, axes)
