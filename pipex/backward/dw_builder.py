"""A builder for the public seam of torch's stages: ``PipelineStage(module, ..., dw_builder=dw_builder(module))``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pipex.backward.tape import Splitter, Tape


def dw_builder(module: nn.Module) -> Callable[[], Callable[[], None]]:
    """Defers the weight gradients of ``module`` and builds the W's that make them, in the order of the backwards.

    From now on a backward through the module's forward leaves the gradients of its linear layers and embeddings to W;
    every other gradient is made at once. torch's stage runs one backward and then asks for its W: B runs it at once,
    a schedule that splits later. Needs nothing private of torch, and splits stage 0 as well.

    Returns:
        the builder: called after a backward, it returns the function that makes what this backward left.

    Raises:
        UnsupportedModule: in a backward that the module's own forward runs, or one with create_graph.
    """
    splitter = Splitter(module.parameters())
    open_tapes: list[Tape] = []
    ended: list[Tape] = []

    def start(_: nn.Module, __: Any) -> None:
        open_tapes.append(splitter.record(ended.append).__enter__())

    def stop(_: nn.Module, __: Any, ___: Any) -> None:
        open_tapes.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(start)
    module.register_forward_hook(stop, always_call=True)

    def build() -> Callable[[], None]:
        tapes = ended[:]
        ended.clear()

        def weight() -> None:
            for tape in tapes:
                tape.backward_weight()

        return weight

    return build
