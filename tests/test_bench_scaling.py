"""The arithmetic of docs/scaling.md: by hand, and the page's tables are the command's."""

from pathlib import Path

import pytest

from cit_scale import cli
from cit_scale.bench import scaling
from cit_scale.bench.scaling import LIVE, RECORDED, STUDENTS, TEACHERS, Counted, Inputs, Step
from cit_scale.run.auto import with_precision
from cit_scale.run.plan import estimate_memory

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
GPUS = [1, 8, 64]
# 1,000 parameters; an image takes 3 x 2 + 4 = 10 TFLOP, or 6 with recorded teachers.
ROUND = Counted(parameters=1000, forward=2 * 10**12, teachers=4 * 10**12)
INPUTS = Inputs(gpu="H100", reached=0.1, node_link=2e-6, network_link=1e-6, node_gpus=4, host_ms=7.0)


def test_the_networks_are_those_of_the_recipes():
    for name, student in zip(("cit_tiny", "cit_small", "cit_base"), STUDENTS, strict=True):
        config = with_precision(cli.parse_arguments(["--config", name]).config, bf16=True)
        assert config.student.name == student
        assert {name: teacher.model for name, teacher in config.teachers.items()} == TEACHERS
        prepared, inputs = scaling.prepared_run(student, 1, Inputs()).config, Inputs()
        for part in ("optim", "mixing", "train"):
            assert getattr(prepared, part) == getattr(config, part)
        assert prepared.engine.precision == config.engine.precision == "bf16"
        assert prepared.distill.teacher_precision == config.distill.teacher_precision
        assert (config.engine.name, config.engine.ds_config) == ("zero", "zero1")
        assert (inputs.epochs, inputs.batch, inputs.micro_batch, inputs.image_size) == (300, 1024, 128, 224)


def test_a_step_is_the_longer_of_device_and_host_and_then_the_reduction():
    flops_per_s = 0.1 * 989e12
    live = scaling.step(ROUND, LIVE, 4, 8, 2, INPUTS)
    assert live.arithmetic == pytest.approx(1e3 * 16 * 10e12 / flops_per_s)
    assert live.host == 14.0
    assert live.reduction == pytest.approx(1e3 * 2 * 3 / 4 * 4000 / 2e3)
    assert live.ms == live.arithmetic + live.reduction
    recorded = scaling.step(ROUND, RECORDED, 4, 8, 2, INPUTS)
    assert recorded.arithmetic == pytest.approx(0.6 * live.arithmetic)
    assert Step(8, 2, arithmetic=3.0, host=14.0, reduction=5.0).ms == 19.0


def test_gradients_go_over_the_slowest_link_and_alone_over_none():
    assert scaling.reduction_ms(ROUND, 1, INPUTS) == 0
    within, between = (scaling.reduction_ms(ROUND, gpus, INPUTS) for gpus in (4, 8))
    assert within == pytest.approx(1e3 * 1.5 * 4000 / 2e3)
    assert between == pytest.approx(1e3 * 1.75 * 4000 / 1e3)


def test_hours_are_those_of_whole_batches():
    inputs = Inputs(images=1050, batch=100, epochs=36)
    assert scaling.hours(10.0, inputs) == 36 * 10 * 100 / 10 / 3600


def test_recorded_outputs_are_two_bytes_a_class_of_each_teacher_and_view():
    inputs = Inputs(images=10, classes=100)
    assert scaling.recorded_bytes(3, inputs) == 10 * 3 * 2 * 100 * 2
    assert scaling.recorded_bytes(3, inputs, most=5) == 10 * 3 * 2 * 5 * 4


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.123, "0.12"), (9.94, "9.9"), (9.96, "10"), (1234, "1,200")])
def test_figures_have_two_digits(value, text):
    assert scaling.two_digits(value) == text


def test_the_tables_of_the_page_are_the_commands():
    inputs = Inputs()
    counted = {name: scaling.count(name, inputs) for name in STUDENTS}
    for part in (
        scaling.inputs_text(inputs),
        scaling.networks_table(counted),
        scaling.time_table(counted, GPUS, inputs),
        scaling.disk_table(inputs),
    ):
        assert part in PAGE, f"docs/scaling.md is to have\n{part}"


@pytest.mark.slow
def test_the_memory_of_the_page_is_the_commands_and_the_plans():
    shown = scaling.memory_table(STUDENTS, GPUS, Inputs())
    assert shown in PAGE, f"docs/scaling.md is to have\n{shown}"
    prepared = scaling.prepared_run(STUDENTS[0], 8, Inputs())
    live, recorded = (scaling.memory_bytes(prepared, kind, Inputs()) for kind in (LIVE, RECORDED))
    assert live == estimate_memory(prepared).device
    assert recorded < live


def test_the_command_prints_what_it_was_asked_for(capsys):
    asked = ["--students", STUDENTS[0], "--gpus", "2", "--memory", "off", "--gpu", "A100", "--epochs", "7"]
    assert scaling.main(asked) == 0
    said = capsys.readouterr().out
    assert said.startswith("Arithmetic, nothing was run: --gpu A100 ")
    assert "| cit_tiny_patch16_224, live, 2 | 4 x 128 |" in said
    assert [line.split()[1] for line in said.splitlines() if line[:3] in ("| 1", "| 5", "| 7")] == ["1", "7", "50"]


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (["--gpu", "B300"], "'B300' is none of H200, H100 NVL, H100 PCIe, H100, A100, L40S, L4, V100, T4"),
        (["--reached", "-1"], "--reached: '-1' is not a number above 0"),
        (["--reached", "2"], "--reached 2 is more than the whole peak; give a share above 0, at most 1"),
        (["--data", "much"], "--data: 'much' is not a number above 0"),
        (["--epochs", "0"], "--epochs: '0' is not a whole number above 0"),
    ],
)
def test_what_cannot_be_reckoned_is_refused(asked, answer, capsys):
    with pytest.raises(SystemExit) as left:
        scaling.main(asked)
    assert left.value.code == 2
    assert answer in capsys.readouterr().err


def test_networks_are_counted_at_the_size_that_they_see(capsys):
    assert scaling.main(["--students", STUDENTS[0], "--gpus", "1", "--memory", "off", "--image_size", "112"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {STUDENTS[0]} |"))
    assert row.split("|")[3].strip() == "1.4"  # GFLOP, a quarter of the 5.7 at 224 pixels


def test_a_batch_that_does_not_divide_is_one_line(capsys):
    assert scaling.main(["--students", STUDENTS[0], "--gpus", "3", "--memory", "off"]) == 2
    assert capsys.readouterr().err.startswith("error: train.global_batch_size=1024 does not give each of 3 ranks")
