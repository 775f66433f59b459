"""What this process still has of stages that other ranks train.

Users make the whole model on every rank, and may keep it or let it go. So it is held weakly: nothing here keeps memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from weakref import ref

from torch import nn

from pipex.partition import Stage
from pipex.torch_internals import parameters_of


class Copy(NamedTuple):
    """A parameter of another rank's stage."""

    stage: Stage
    path: str
    parameter: nn.Parameter

    def called(self) -> str:
        """Its name in the model."""
        return self.stage.called(self.path)


class Elsewhere:
    """Args:
    given: the model's stages as the user has given them.
    kept: the same where they are this rank's, and skeletons of the others.
    """

    def __init__(self, given: Sequence[Stage], kept: Sequence[Stage]) -> None:
        others = [(real, skeleton) for real, skeleton in zip(given, kept, strict=True) if real is not skeleton]
        self._layers = [
            (skeleton, str(p), ref(layer)) for real, skeleton in others for p, layer in enumerate(real.layers)
        ]
        self._modules: list[tuple[Stage, str, ref[nn.Module]]] = []

    def look(self) -> None:
        """Sees which modules there are now."""
        self._modules = [
            (stage, f"{position}.{path}." if path else f"{position}.", ref(module))
            for stage, position, kept in self._layers if (layer := kept()) is not None
            for path, module in layer.named_modules()
        ]  # fmt: skip

    def parameters(self) -> Iterator[Copy]:
        """Those that there are now."""
        for stage, path, kept in self._modules:
            if (module := kept()) is not None:
                for name, parameter in parameters_of(module).items():
                    if parameter is not None:
                        yield Copy(stage, path + name, parameter)
