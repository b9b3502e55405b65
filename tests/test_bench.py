"""The benchmarks measure what they say they measure."""

import re

import pytest
import torch

from cit_scale.bench import involution as bench_involution
from cit_scale.bench import teachers as bench_teachers
from cit_scale.bench.involution import (
    COPY,
    REFERENCE,
    Case,
    Figures,
    bandwidth_shares,
    cases_of,
    choose_ways,
    measure,
    summary,
)
from cit_scale.bench.measure import geometric_mean, peak_extra_mib, ratio, take_turns
from cit_scale.config import DistillConfig
from cit_scale.models.network import build_network
from cit_scale.teachers import freeze

CPU = torch.device("cpu")


def test_rednet101_has_34_involutions_of_8_kinds():
    cases = cases_of("rednet101", 224, 8)
    assert list(cases.values()) == [1, 3, 1, 3, 1, 22, 1, 2]
    assert next(iter(cases)) == Case(8, 32, 2, 3, 1, 112, 112)
    assert Case(8, 256, 16, 7, 1, 14, 14) in cases
    assert Case(8, 512, 32, 7, 2, 14, 14) in cases


def test_every_way_is_right_and_the_operator_needs_a_tenth_of_unfolds_memory_at_most():
    case = Case(4, 64, 4, 7, 1, 56, 56)
    ways = choose_ways(CPU, inductor=False)
    results = measure(case, ways, torch.float32, CPU, rounds=1)
    assert set(results) == {COPY, *ways}
    assert max(results[name].error for name in ways) < 1e-6
    outputs_mib = (3211264 / 2**20, (2 * 3211264 + 9834496) / 2**20)  # out; out and both gradients
    for which in (0, 1):
        peaks = {name: results[name].peaks_mib[which] for name in ways}
        assert peaks[REFERENCE] > 49 * outputs_mib[0]
        for name in ("operator", "operator, contiguous"):
            assert 0.9 * outputs_mib[which] < peaks[name] < peaks[REFERENCE] / 10
    figures = Figures(times=([1e3], [3e3]), first_s=0, peaks_mib=(0, 0), error=0)  # backward takes 2 s
    moved_bytes = 4 * (2 * 802816 + 2458624), 4 * (3 * 802816 + 2 * 2458624)
    assert bandwidth_shares(case, figures, 4, 1e9) == pytest.approx((moved_bytes[0] / 1e9, moved_bytes[1] / 2e9))
    line = next(line for line in summary({case: results}, ways).splitlines() if line.startswith("| unfold "))
    assert line.count("1.0 (1.0)") == 2


def test_bfloat16_ways_are_measured_against_the_same_rounded_inputs():
    results = measure(Case(2, 32, 2, 3, 2, 9, 9), choose_ways(CPU, inductor=False), torch.bfloat16, CPU, rounds=1)
    assert results["operator"].error < 2e-3
    assert results["operator"].error < results[REFERENCE].error


def test_turns_are_taken_and_ratios_are_paired():
    called = []
    times = take_turns({name: lambda name=name: called.append(name) for name in "ab"}, 3, CPU, at_least_ms=0.0)
    assert [len(figures) for figures in times.values()] == [3, 3]
    assert "".join(called).endswith("ababab")
    assert ratio([2, 10, 6], [1, 1, 1]) == 6
    assert geometric_mean(iter([1, 4])) == pytest.approx(2)


def test_the_peak_is_what_a_call_holds_at_once():
    def twice_64_mib():
        torch.ones(2**24)
        return torch.ones(2**24) + torch.ones(1)  # the term is freed with the call, the sum is its result

    assert 124 < peak_extra_mib(twice_64_mib, CPU) < 140  # the kernel counts in batches of pages
    assert peak_extra_mib(lambda: None, CPU) < 4


@pytest.mark.parametrize("text", ["rednet101", "rednet101@224", "regnety_002@224x8"])
def test_shapes_that_name_nothing_are_answered_with_what_there_is(text, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["involution", "--shapes", text])
    with pytest.raises(SystemExit):
        bench_involution.main()
    assert f"'{text}' is not NAME@SIZExBATCH" in (said := capsys.readouterr().err)
    assert "rednet26" in said


@pytest.fixture
def _keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_keep_threads")
def test_the_command_prints_tables(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["involution", "--shapes", "rednet26@32x2", "--rounds", "1"])
    bench_involution.main()
    said = capsys.readouterr().out
    assert re.search(r"commit \w+.*1 threads.*float32; median", said)
    widths = {line.count(" | ") for line in said.splitlines() if line.startswith("| ")}
    assert widths == {13, 7}  # each table's lines have equally many cells
    assert said.count("| 2 x 32 x 16 x 16, 3x3 (1 times) |") == 5


@pytest.mark.usefixtures("_keep_threads")
def test_teachers_are_timed_as_a_run_loads_them(capsys, monkeypatch):
    small = ["--models", "regnety_002", "--image_size", "32", "--batch", "2", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["teachers", *small])
    bench_teachers.main()
    said = capsys.readouterr().out
    assert "| regnety_002, as loaded |" in said
    assert "2 images of 32 pixels, float32" in said


def test_over_unfold_a_rednet_says_the_same():
    network = build_network("rednet26", {"layers": [1, 1, 1, 1]}, num_classes=5, image_size=32)
    forward = freeze(network, DistillConfig(compile=False), CPU)
    images = torch.rand(2, 3, 32, 32)
    over_unfold = bench_teachers.over_unfold(forward)
    torch.testing.assert_close(over_unfold(images), forward(images), rtol=1e-4, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_teachers, "unfold", lambda x, kernel, stride: x[:, :, ::stride, ::stride])
        assert not torch.allclose(over_unfold(images), forward(images))
