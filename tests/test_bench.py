"""The benchmarks measure what they say they measure."""

import math
import re
import subprocess
import sys
from dataclasses import replace

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
    row,
    summary,
)
from cit_scale.bench.measure import geometric_mean, ratio, spread, take_turns
from cit_scale.models.network import build_network
from cit_scale.teachers import freeze

CPU = torch.device("cpu")


def test_rednet101_has_34_involutions_of_8_kinds():
    cases = cases_of("rednet101", 224, 8)
    assert list(cases.values()) == [1, 3, 1, 3, 1, 22, 1, 2]
    assert next(iter(cases)) == Case(8, 32, 2, 3, 1, 112, 112)
    assert Case(8, 256, 16, 7, 1, 14, 14) in cases
    assert Case(8, 512, 32, 7, 2, 14, 14) in cases


@pytest.mark.slow
@pytest.mark.parametrize(("stride", "dtype"), [(1, torch.float32), (2, torch.float32), (1, torch.bfloat16)])
def test_every_way_is_right_and_the_operator_needs_a_tenth_of_unfolds_memory_at_most(stride, dtype):
    case = Case(4, 64, 4, 7, stride, 56, 56)
    ways = choose_ways(CPU, inductor=False)
    results = measure(case, ways, dtype, CPU, rounds=1)
    assert set(results) == {COPY, *ways}
    assert results["operator"].error < (1e-6 if dtype == torch.float32 else 2e-3)
    assert max(results[name].error for name in ways) < (1e-6 if dtype == torch.float32 else 1e-2)
    x, kernel, out = (math.prod(shape) * dtype.itemsize / 2**20 for shape in case.shapes)
    outputs_mib = out, out + x + kernel
    for which in (0, 1):
        peaks = {name: results[name].peaks_mib[which] for name in ways}
        assert peaks[REFERENCE] > 49 * outputs_mib[0]
        for name in ("operator", "operator, contiguous"):
            assert 0.9 * outputs_mib[which] < peaks[name] < peaks[REFERENCE] / 10
    assert results[COPY].peaks_mib[0] < 1


def test_the_tables_say_what_the_figures_say():
    case = Case(4, 64, 4, 7, 1, 56, 56)
    by_way = {
        COPY: Figures(times=([0.5], [1.0]), first_s=0.0, peaks_mib=(0.1, 0.1), error=0.0),
        REFERENCE: Figures(times=([10.0], [30.0]), first_s=0.04, peaks_mib=(100.0, 200.0), error=1e-7),
        "operator": Figures(times=([1.0], [2.0]), first_s=3.0, peaks_mib=(5.0, 20.0), error=2e-7),
    }
    cells = row("a case", "operator", by_way, (0.5, 0.25))
    assert cells == [
        "a case", "operator", "1 (1 to 1)", "10.0", "2.00", "5.0", "50",
        "2 (2 to 2)", "15.0", "2.00", "20.0", "25", "3.00", "2.0e-07",
    ]  # fmt: skip
    assert row("a case", COPY, by_way, (0.5, 0.25))[6] == ""  # it is what the others are shares of
    slower = {name: replace(figures, times=([40.0], [60.0])) for name, figures in by_way.items()}
    results = {case: by_way, replace(case, batch=8): by_way | {"operator": slower["operator"]}}
    line = summary(results, ["operator"]).splitlines()[-1]
    forward, both = "1.6 (0.2) | 12.65 (80.00) | 0.050 (0.050)", "2.7 (0.5) | 10.95 (60.00) | 0.100 (0.100)"
    assert line == f"| operator | {forward} | {both} | 2.0e-07 |"


def test_bandwidth_counts_each_input_and_output_once():
    case = Case(4, 64, 4, 7, 1, 56, 56)
    figures = Figures(times=([1e3], [3e3]), first_s=0, peaks_mib=(0, 0), error=0)  # backward takes 2 s
    moved_bytes = 4 * (2 * 802816 + 2458624), 4 * (3 * 802816 + 2 * 2458624)
    assert bandwidth_shares(case, figures, 4, 1e9) == pytest.approx((moved_bytes[0] / 1e9, moved_bytes[1] / 2e9))


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
    assert spread([1234.5, 0.01234, 999.4]) == "999 (0.0123 to 1234)"
    assert geometric_mean(iter([1, 4])) == pytest.approx(2)


def test_the_peak_is_what_a_call_holds_at_once():
    # In a fresh process: what earlier tests left in the heap would blur the figures.
    program = """
import torch
from cit_scale.bench.measure import peak_extra_mib

def twice_64_mib():
    torch.ones(2**24)  # freed at once
    return torch.ones(2**24) + torch.ones(1)  # a term, freed with the call, and a result

print(peak_extra_mib(twice_64_mib, torch.device("cpu")), peak_extra_mib(lambda: None, torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    twice, nothing = map(float, done.stdout.split())
    assert 124 < twice < 140  # the kernel counts in batches of pages
    assert nothing < 4


@pytest.mark.parametrize("text", ["rednet101", "rednet101@large", "regnety_002@224x8"])
def test_shapes_that_name_nothing_are_answered_with_what_there_is(text, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["involution", "--shapes", text])
    with pytest.raises(SystemExit):
        bench_involution.main()
    assert f"'{text}' is not NAME@SIZE[xBATCH]" in (said := capsys.readouterr().err)
    assert "rednet26" in said


@pytest.fixture
def _keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("_keep_threads")
def test_the_command_prints_tables(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["involution", "--shapes", "rednet26@32x2", "--rounds", "1"])
    bench_involution.main()
    said = capsys.readouterr().out
    assert re.search(r"commit \w+.*1 threads.*float32; median", said)
    widths = {line.count(" | ") for line in said.splitlines() if line.startswith("| ")}
    assert widths == {13, 7}  # each table's lines have equally many cells
    assert said.count("| 2 x 32 x 16 x 16, 3x3 (1 times) |") == 5


@pytest.mark.slow
@pytest.mark.usefixtures("_keep_threads")
def test_teachers_are_timed_as_a_run_loads_them(capsys, monkeypatch):
    small = ["--models", "resnet10t", "--image_size", "32", "--batch", "2", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["teachers", *small])
    bench_teachers.main()
    said = capsys.readouterr().out
    assert "| resnet10t, as loaded |" in said
    assert "2 images of 32 pixels, float32" in said


def test_over_unfold_a_rednet_says_the_same():
    network = build_network("rednet26", {"layers": [1, 1, 1, 1]}, num_classes=5, image_size=32)
    forward = freeze(network, 32, CPU, precision="float32", compile=False)
    images = torch.rand(2, 3, 32, 32)
    over_unfold = bench_teachers.over_unfold(forward)
    torch.testing.assert_close(over_unfold(images), forward(images), rtol=1e-4, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_teachers, "unfold", lambda x, kernel, stride: x[:, :, ::stride, ::stride])
        assert not torch.allclose(over_unfold(images), forward(images))
