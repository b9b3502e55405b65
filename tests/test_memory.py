"""What is said when a device's memory is used up, and how a run ends that meets it."""

import dataclasses
import pickle

import pytest
import torch
from sabotage import at, exhaust
from tiny_run import TinyRun, make_inputs

from cit_scale import cli, train
from cit_scale.config import split_batch
from cit_scale.distributed.world import World
from cit_scale.errors import MOST_CHARACTERS, ConfigError, DeviceMemoryError, error_line, exit_code_of, is_out_of_memory
from cit_scale.inference.entry import ON_THE_CPU, SMALLER_BATCHES, run_command
from cit_scale.inference.turns import _in_halves
from cit_scale.run import memory
from cit_scale.run.memory import DeviceUse, out_of_memory, smaller_micro_batch, way_out
from cit_scale.run.setup import prepare
from launchers import requeue

GIB = 2**30
TORCHS = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.19 GiB of which 1.10 GiB is free."
)


def parse(*argv):
    return cli.parse_arguments(argv).config


@pytest.mark.parametrize(
    "error",
    [
        TORCHS,
        pickle.loads(pickle.dumps(TORCHS)),  # as run_on_all_ranks sends it to the other ranks
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError(
            "Critical error in pipeline:\nCUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"
        ),
        MemoryError("CUDA allocation failed"),
        RuntimeError("OutOfMemoryError: CUDA out of memory."),  # as predict sends it to rank 0
    ],
)
def test_every_librarys_way_to_say_that_a_device_is_full_is_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448."),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        MemoryError(),  # Python's own, of the machine's memory
        ValueError("out of memory"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_no_other_error_is_taken_for_one(error):
    assert not is_out_of_memory(error)


def test_what_torch_raises_on_a_cpu_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("group_size", [None, 1, 4, 8])
def test_the_smaller_micro_batch_is_the_largest_one_below_that_divides(world_size, group_size):
    share, group = 96, group_size or 1
    dividing = [size for size in range(1, share + 1) if share % size == 0 and size % group == 0]
    for size in dividing:
        config = parse(
            *("--train.global_batch_size", str(share * world_size), "--train.micro_batch_size", str(size)),
            *("--mixing.group_size", "null" if group_size is None else str(group_size)),
        )
        assert split_batch(config, world_size).micro_batch_size == size
        assert smaller_micro_batch(config, world_size) == max((each for each in dividing if each < size), default=None)


def test_without_a_smaller_micro_batch_the_way_out_is_what_is_not_set_yet():
    smallest = parse("--train.micro_batch_size", "8")
    first, second, third = (
        "engine.activation_checkpointing=true",
        "engine.ds_config=zero3",
        "engine.precision=bf16 for a new run",
    )
    said = way_out(smallest, 8)
    assert said.startswith("no micro-batch below 8 divides: set ")
    assert all(each in said for each in (first, second, third))
    all_set = parse(
        *("--train.micro_batch_size", "8", "--engine.activation_checkpointing", "true"),
        *("--engine.ds_config", "zero3", "--engine.precision", "bf16"),
    )
    assert not any(each in way_out(all_set, 8) for each in (first, second, third))
    assert "mixing.group_size" in way_out(all_set, 8)
    assert second not in way_out(smallest, 1)  # a rank alone has nobody to share with


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture
def run(inputs, tmp_path):
    return TinyRun(inputs, tmp_path / "runs", "plain")


@pytest.fixture
def prepared(run):
    arguments = cli.parse_arguments(run.argv)
    return prepare(arguments.config, arguments.teacher_run_configs, World(), same_run=True)


def test_the_line_names_the_gpu_what_it_took_and_the_micro_batch_that_is_next(prepared, monkeypatch):
    train = dataclasses.replace(prepared.config.train, micro_batch_size=8)
    prepared = dataclasses.replace(prepared, config=dataclasses.replace(prepared.config, train=train))
    used = DeviceUse("NVIDIA H100 80GB HBM3", 80 * GIB, 70 * GIB, 8 * GIB)
    monkeypatch.setattr(memory, "device_use", lambda device: used)
    error = out_of_memory(prepared, TORCHS)
    assert isinstance(error, ConfigError)
    assert exit_code_of(error) in requeue.HOPELESS
    line = str(error)
    assert line.startswith("tiny: out of memory on rank 0's NVIDIA H100 80GB HBM3: it asked for 2.50 GiB; ")
    assert "its peak was 70.00 GiB of 80.00 GiB, 8.00 GiB held beside tensors; the plan says 1.00 GiB (" in line
    assert line.endswith("; set train.micro_batch_size=4")
    assert len(line) <= MOST_CHARACTERS
    assert line == error_line(error)


def test_the_longest_line_keeps_its_way_out(prepared, monkeypatch):
    used = DeviceUse("NVIDIA GH200 144G HBM3e", 140 * GIB, 130 * GIB, 8 * GIB)
    monkeypatch.setattr(memory, "device_use", lambda device: used)
    monkeypatch.setattr(memory, "smaller_micro_batch", lambda config, world_size: None)
    line = str(out_of_memory(prepared, RuntimeError(f"CUDA error: out of memory {'x' * 500}")))
    assert len(line) <= MOST_CHARACTERS
    assert line.endswith("data.image_size")


def test_an_estimate_that_fails_does_not_hide_the_error(prepared, monkeypatch):
    def fail(prepared):
        raise RuntimeError("of a model's code")

    monkeypatch.setattr(memory, "estimate_memory", fail)
    assert "the plan says not known (RuntimeError)" in str(out_of_memory(prepared, TORCHS))


@pytest.mark.parametrize("place", ["train_step", "load", "evaluate_student"])
def test_a_run_that_meets_it_ends_with_one_line_and_is_not_requeued(run, place, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise TORCHS

    monkeypatch.setattr(train, place, fail)
    assert train.main(run.argv) == 2 == DeviceMemoryError.exit_code
    shown = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "".join(shown)
    (line,) = (each for each in shown if each.startswith("error: "))
    assert line.startswith("error: tiny: out of memory on rank 0's CPU: it asked for 2.50 GiB; its peak is not known;")
    assert shown[-1] == line
    assert 2 in requeue.HOPELESS


def test_a_student_is_tried_before_its_teachers_are_trained(prepared, monkeypatch, capsys):
    """With teachers as they are initialized, and nothing of it is left behind."""
    tried = []
    inner = train.try_update

    def try_update(engine, teachers, prepared):
        before = {key: tensor.clone() for key, tensor in engine.module.state_dict().items()}
        inner(engine, teachers, prepared)
        tried.append([teacher.name for teacher in teachers])
        assert all(torch.equal(before[key], tensor) for key, tensor in engine.module.state_dict().items())

    monkeypatch.setattr(train, "try_update", try_update)
    train.try_student(prepared)
    assert tried == [["conv"]]
    assert "tiny  tries an update at full size" in capsys.readouterr().out
    assert not prepared.config.run_dir.exists()
    monkeypatch.setattr(train, "advised_loss", at_once_full)
    with pytest.raises(DeviceMemoryError, match="tiny: out of memory on rank 0's CPU"):
        train.try_student(prepared)


def at_once_full(*args):
    raise TORCHS


def test_before_there_is_a_run_it_is_torchs_own_line(run, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise TORCHS

    monkeypatch.setattr(train, "join", fail)
    assert train.main(run.argv) == 2
    assert capsys.readouterr().err.startswith("error: rank 0: CUDA out of memory. Tried to allocate 2.50 GiB.")


def test_any_other_error_of_a_step_stays_a_traceback(run, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(train, "train_step", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        train.main(run.argv)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize(("layout", "place"), [("zero1", "forward"), ("zero3", "backward"), ("fsdp2", "batch")])
def test_it_is_said_on_the_rank_that_meets_it_alone(inputs, tmp_path, layout, place):
    ended = TinyRun(inputs, tmp_path / "runs", layout).run(sabotage=(at, 1, place, 2, exhaust))
    assert ended.code == ended.codes[1] == 2, ended.output
    said = [line for line in ended.outputs[1].splitlines() if "out of memory" in line.lower()]
    assert len(said) == 1, ended.output
    assert said[0].startswith("error: tiny: out of memory on rank 1's CPU: it asked for 2.50 GiB;")
    assert "Traceback" not in ended.outputs[1]
    assert "error: tiny" not in ended.outputs[0]


@pytest.mark.parametrize("way_out", [SMALLER_BATCHES, ON_THE_CPU])
def test_a_command_that_meets_it_says_what_it_can_be_given(way_out, capsys):
    def work(world):
        raise TORCHS

    assert run_command(work, needs_less_memory=way_out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rank 0: CUDA out of memory. Tried to allocate 2.50 GiB.")
    assert line.endswith(f"; {way_out}")


def test_a_batch_is_halved_whatever_library_says_that_it_is_too_large():
    class Classifier:
        largest = 3

        def classify(self, images):
            if len(images) > self.largest:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return {"cls": images.flatten(1)}

    images = torch.rand(10, 3, 1, 1)
    parts = _in_halves(Classifier(), images)
    assert torch.equal(torch.cat([part["cls"] for part in parts]), images.flatten(1))
    Classifier.largest = 0
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        _in_halves(Classifier(), images)
