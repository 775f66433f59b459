"""Evaluation mode and back, as ``model.eval()`` and ``model.train()`` do it.

What a module's own ``train`` does belongs to its mode: an adapter may add its product to the weight it adapts for
evaluation, and take it out again for training. So it is called, and ``training`` is not just set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from pipex.partition import Stage

Modes = dict[nn.Module, bool]


@contextmanager
def evaluation(stages: Iterable[Stage], together: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """The layers are in evaluation mode inside, and each of their modules in its own mode again afterwards.

    Args:
        together: around what must not fail on one rank alone.
    """
    layers = {layer: None for stage in stages for layer in stage.layers}  # one that is used twice is told once
    modes = {module: module.training for layer in layers for module in layer.modules()}
    with together():
        for layer in layers:
            layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            _restore(layer, modes)


def _restore(module: nn.Module, modes: Modes) -> None:
    inside = {modes[other] for other in module.modules() if other in modes}  # not in it: what its eval() has made
    if inside == {True}:
        module.train()
        return
    if inside <= {False}:
        if any(other.training for other in module.modules()):  # a parent has told it
            module.eval()
        return
    own = type(module).train is not nn.Module.train
    if own:
        module.train(modes.get(module, module.training))
    else:
        module.training = modes.get(module, module.training)  # all that it does, but for the children
    for child in module.children():
        if not own or any(other.training is not modes.get(other, other.training) for other in child.modules()):
            _restore(child, modes)
