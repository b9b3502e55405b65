"""However many networks a process compiles, none of them runs eager in silence."""

import pytest
import torch
from engine_cases import make_engine
from torch import nn
from torch._dynamo.testing import CompileCounter

from cit_scale.distributed.world import World
from cit_scale.models.compiling import compile_module
from cit_scale.models.network import build_network
from cit_scale.teachers import freeze

CPU = torch.device("cpu")


@pytest.fixture
def compiled(monkeypatch):
    """Dynamo traces as always; what is traced is counted and runs as it is, without a C++ compiler."""
    counter, compile_ = CompileCounter(), nn.Module.compile
    torch._dynamo.reset()
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, *, mode, **options: compile_(self, backend=counter, **options)
    )
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        yield counter
    torch._dynamo.reset()


def teacher(width):
    network = build_network("resnet10t", {"channels": [width] * 4, "stem_width": 8}, num_classes=3, image_size=16)
    return freeze(network, 16, CPU, precision="float32", compile=True)


def test_a_student_and_its_teachers_after_runs_of_their_own(compiled):
    """Each is one more of the same function: in its own run, frozen, and the student in both modes."""
    images = torch.rand(2, 3, 16, 16)
    advisers = [teacher(width) for width in range(8, 72, 8)]
    engine = make_engine(World(), "plain", 1, "", settings={"compile": True})
    for forward in advisers:
        forward(images)
    assert compiled.frame_count == len(advisers)
    for mode in (True, False):
        engine.module.train(mode)
        engine.forward(images)
    assert compiled.frame_count == len(advisers) + 2


def test_blocks_that_drop_paths_at_rates_of_their_own(compiled):
    """As FSDP2 compiles them, by block: of one function each."""
    blocks = build_network(
        "vit_tiny_patch16_224",
        {"depth": 12, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "drop_path_rate": 0.1},
        num_classes=3,
        image_size=16,
    ).model.blocks
    for block in blocks:
        compile_module(block)
        block.train()(torch.rand(2, 5, 32))
    assert compiled.frame_count >= 11
