"""A builder for the public seam of torch's stages: ``PipelineStage(module, ..., dw_builder=dw_builder(module))``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from pipex.backward.passes import Deferred
from pipex.backward.splitter import Splitter


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
    splitter = Splitter.of(module)
    forward = module.forward
    ended: list[Deferred] = []

    def prepared(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = forward if self is module else partial(type(self).forward, self)
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        with splitter.record(ended.append):
            return splitter.own.call(self, run, *args, **kwargs)

    module.forward = MethodType(prepared, module)  # a method, so that a copy of the module does not run this one

    def build() -> Callable[[], None]:
        tapes = ended[:]
        ended.clear()

        def weight() -> None:
            for tape in tapes:
                tape.backward_weight()

        return weight

    return build
