"""torch.compile, for networks whose inputs have few, fixed shapes."""

from __future__ import annotations

from torch import nn

# Dynamo counts by function what it has compiled, and all networks of a process share theirs: student and teachers, each
# in training and in evaluation mode, and so do all blocks of one network, of which each may drop paths at a rate of its
# own. From its own limit of eight on it would run the rest eager, with one warning.
RECOMPILE_LIMIT = 128


def compile_module(module: nn.Module, mode: str | None = None) -> None:
    """Compile a module in place, so that its parameters keep their names. mode: torch.compile's."""
    import torch._dynamo  # takes a second

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    module.compile(dynamic=False, mode=mode)
