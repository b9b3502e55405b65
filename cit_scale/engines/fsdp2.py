"""PyTorch's fully_shard (FSDP2), on any number of ranks and without DeepSpeed.

Each rank holds a part of every parameter, of its moments and its average. A block's weights are gathered for its
forward and backward passes and dropped again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cit_scale.distributed.world import World
from cit_scale.engines.activation_checkpointing import blocks_of
from cit_scale.engines.base import EngineSetup
from cit_scale.engines.torch_engine import TorchEngine
from cit_scale.models.compiling import compile_module
from cit_scale.models.network import AUTOCAST, Network


class Fsdp2Engine(TorchEngine):
    """The ``Engine`` over ``fully_shard``. Collective to build."""

    def _place(self, module: Network, setup: EngineSetup) -> ShardedTensors:
        blocks = blocks_of(module)
        if setup.engine.compile is True:
            # Before sharding and by block, so that gathering weights stays outside of what is compiled.
            for block in blocks or [module]:
                compile_module(block)
        _shard(module, blocks, AUTOCAST.get(setup.engine.precision), setup.world)
        return ShardedTensors(module)

    def _backward(self, loss: Tensor) -> None:
        # Gradients are reduced once an update. Until then each rank keeps a whole float32 gradient, 0.35 GB for the
        # largest CiT: little beside the activations of a micro-batch, and only the last micro-step sends messages.
        assert isinstance(self.module, FSDPModule)  # since fully_shard
        self.module.set_requires_gradient_sync(self._is_last_micro_step)
        super()._backward(loss)


def _shard(module: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype | None, world: World) -> None:
    """Collective. Shard each block for itself, then the rest of the module.

    dtype: autocast's, if any.
    - A block's matrices are gathered in ``dtype``: half the message, and the same numbers, as autocast would round the
      matrices anyway. Gradients are summed in float32.
    - A block's norms are a group of their own, gathered in float32: rounded, they would shift the activations, and on a
      CPU a LayerNorm refuses to mix types.
    - cast_forward_inputs is off: it would round the residual stream at every block.
    - The rest (stems with their BatchNorm, embedding, heads) is gathered in float32 and computed under autocast, as
      with the other engines.
    """
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        norms = [layer for layer in block.modules() if _is_vector(layer)]
        if dtype is not None and norms:
            fully_shard(norms, mesh=mesh, mp_policy=exact)
        fully_shard(block, mesh=mesh, mp_policy=rounded)
    fully_shard(module, mesh=mesh, mp_policy=exact)


def _is_vector(layer: nn.Module) -> bool:
    """Whether it is a norm or a scale: a layer of its own, with parameters of which none is a matrix."""
    parameters = list(layer.parameters())
    return not list(layer.children()) and bool(parameters) and all(parameter.ndim == 1 for parameter in parameters)


class ShardedTensors:
    """FSDP2's ``ParameterPlacement``: each parameter is a DTensor cut along its first dimension; parts may be empty."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # While weights are gathered the module holds others; these are the ones that stay.
        # fully_shard has made each a DTensor, which named_parameters does not tell.
        self._parameters = cast(dict[str, DTensor], dict(module.named_parameters()))
        self.shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        self.pieces: list[Tensor] = list(self._parameters.values())

    def assemble(self, pieces: Sequence[Tensor]) -> Iterable[tuple[str, Tensor]]:
        for name, piece in zip(self.shapes, pieces, strict=True):
            yield name, cast(DTensor, piece.detach()).full_tensor()

    def cut(self, whole: Callable[[str], Tensor]) -> Iterator[Tensor]:
        for name, parameter in self._parameters.items():
            # Without a source rank nothing is sent: every rank has the whole, and keeps its part.
            yield distribute_tensor(
                whole(name).to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )

    def publish(self) -> None:
        # A forward pass in evaluation leaves the root's weights gathered, and the next one would use that stale copy.
        for module in self._module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
