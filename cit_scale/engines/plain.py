"""One process, plain PyTorch: what the other engines are tested against."""

from __future__ import annotations

from cit_scale.engines.base import EngineSetup
from cit_scale.engines.state import WholeParameters
from cit_scale.engines.torch_engine import TorchEngine
from cit_scale.models.compiling import compile_module
from cit_scale.models.network import Network


class PlainEngine(TorchEngine):
    """The ``Engine`` of a process alone."""

    def _place(self, module: Network, setup: EngineSetup) -> WholeParameters:
        if setup.engine.compile is True:
            compile_module(module)
        return WholeParameters(module)
