"""engine.deterministic: what it sets, that it changes nothing on a CPU, and what it refuses."""

import json

import pytest
import torch
from engine_cases import differences, make_engine, numpy_state, shardings_on, update
from involution_cases import CASES, draw
from ranks import run_on_ranks
from sabotage import at
from test_config import parse
from tiny_run import TinyRun, assert_same_end

from cit_scale.config import check_config
from cit_scale.errors import ConfigError
from cit_scale.models import arithmetic
from cit_scale.models.arithmetic import naming_operator, set_arithmetic, set_workspaces

ON = ("--engine.deterministic", "true")
CUDA = torch.device("cuda")  # the switches can be set without one


def switches() -> dict[str, bool]:
    import torch._inductor.config as inductor

    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "inductor": inductor.deterministic,
        "memory": not torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark,
    }


@pytest.fixture
def restored(monkeypatch):
    """Afterwards the process computes as it did before."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, products.allow_tf32
    monkeypatch.setenv(arithmetic.WORKSPACES, "")  # to be restored, also where it was not set
    monkeypatch.delenv(arithmetic.WORKSPACES)
    yield monkeypatch
    set_arithmetic(torch.device("cpu"))
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, products.allow_tf32 = before


def test_it_sets_every_switch_and_the_next_run_without_it_sets_them_back(restored):
    set_arithmetic(CUDA, deterministic=True)
    assert switches() == dict.fromkeys(switches(), True)
    assert arithmetic.os.environ[arithmetic.WORKSPACES] == ":4096:8"
    set_arithmetic(CUDA)
    assert switches() == dict.fromkeys(switches(), False)


def test_on_a_cpu_nothing_of_a_gpu_is_touched(restored):
    cudnn = switches()["cudnn"]
    set_arithmetic(torch.device("cpu"), deterministic=True)
    assert switches() == {"algorithms": True, "inductor": True, "memory": True, "cudnn": cudnn}
    assert arithmetic.WORKSPACES not in arithmetic.os.environ


def test_a_workspace_with_which_cublas_is_not_deterministic_is_refused():
    chosen = {arithmetic.WORKSPACES: ":16:8"}
    set_workspaces(chosen)
    assert chosen == {arithmetic.WORKSPACES: ":16:8"}
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0, .* unset it, or set it to :4096:8"):
        set_workspaces({arithmetic.WORKSPACES: ":0:0"})


def test_a_decoder_that_shares_the_images_is_refused_beside_it():
    hardware = ("--data.train", "builtin:digits", "--data.hw_decoder_load", "0.65")
    check_config(parse(*hardware))
    with pytest.raises(ConfigError, match=r"hw_decoder_load=0\.65 .* set data\.hw_decoder_load=0"):
        check_config(parse(*hardware, *ON))


def test_other_errors_pass_by():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), naming_operator():
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_engine_computes_the_same_with_it_and_without(world_size, ds_configs):
    for found in run_on_ranks(world_size, with_and_without, shardings_on(world_size), ds_configs):
        assert found == {sharding: [] for sharding in shardings_on(world_size)}


def with_and_without(world, shardings, ds_configs) -> dict[str, list[str]]:
    """By engine, what differs after two updates."""
    found = {}
    for sharding in shardings:
        states = []
        for deterministic in (False, True):
            set_arithmetic(world.device, deterministic=deterministic)
            engine = make_engine(world, sharding, 2, ds_configs, settings={"deterministic": deterministic})
            for step in range(2):
                update(engine, world, step)
            states.append(numpy_state(engine))
        found[sharding] = differences(*states)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "zero1", "fsdp2"])
def test_a_run_with_it_ends_as_one_without_on_a_cpu(layout, calm, tiny_inputs, tmp_path):
    run = TinyRun(tiny_inputs, tmp_path / "runs", layout, ON)
    run.finish()
    assert_same_end(run, calm(layout))
    assert [start["deterministic"] for start in json.loads((run.run_dir / "env.json").read_text())] == [True]


@pytest.mark.slow
def test_it_may_be_turned_on_when_a_run_goes_on(halted, calm):
    assert "deterministically" in halted.finish(*ON).output
    assert_same_end(halted, calm())
    starts = json.loads((halted.run_dir / "env.json").read_text())
    assert [start["deterministic"] for start in starts] == [False, True]


@pytest.mark.slow
def test_two_compiled_runs_end_alike(tiny_inputs, tmp_path):
    compiled = (*ON, "--engine.compile", "true", "--distill.compile", "true")
    runs = [TinyRun(tiny_inputs, tmp_path / name, "plain", compiled) for name in ("one", "other")]
    for run in runs:
        run.finish()
    assert_same_end(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "zero1"])
def test_an_operator_that_cannot_do_it_ends_the_run_in_one_line(layout, tiny_inputs, tmp_path):
    run = TinyRun(tiny_inputs, tmp_path / "runs", layout)
    planted = (at, None, "forward", 2, write_wherever_it_comes_first)
    ended = run.run(*ON, sabotage=planted)
    assert ended.codes == [2] * run.ranks, ended.output
    assert ended.output.count("engine.deterministic=true, and PyTorch has no deterministic put_ on this device") == 1
    assert "Traceback" not in ended.output
    ended = run.run("--fresh", sabotage=planted)
    assert ended.code == 0, ended.output


def write_wherever_it_comes_first() -> None:
    torch.zeros(1).put_(torch.zeros(2, dtype=torch.int64), torch.arange(2.0))


def test_the_involution_launches_one_choice_and_measures_none(restored):
    triton_kernels = pytest.importorskip("cit_scale.models.involution_triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton does not interpret")
    x, kernel, grad_out = draw(*CASES["stride 2, odd size"])
    tuned, fixed = torch.empty_like(grad_out), torch.empty_like(grad_out)
    triton_kernels.forward(x, kernel, 2, tuned)

    def tune(*_, **__):
        raise AssertionError("asked for the fastest")

    restored.setattr(type(triton_kernels._forward), "run", tune)
    with pytest.raises(AssertionError, match="asked for the fastest"):
        triton_kernels.forward(x, kernel, 2, fixed)
    set_arithmetic(torch.device("cpu"), deterministic=True)
    triton_kernels.forward(x, kernel, 2, fixed)
    assert torch.equal(fixed, tuned)
