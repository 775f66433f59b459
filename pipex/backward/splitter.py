"""Splitters: where a stage's split backward begins."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipex.backward import fsdp
from pipex.backward.passes import Then
from pipex.backward.recordable import Recordable
from pipex.backward.tape import Tape
from pipex.torch_internals import is_compiled


class Splitter(Recordable):
    """Makes tapes for one stage. Arguments and errors as of ``Recordable``."""

    @staticmethod
    def of(module: nn.Module, exact: bool | None = None) -> Splitter:
        """For all parameters of the module; none where they must not be deferred: where DDP waits for them, and where
        compiled parts have a backward of their own."""
        for part in module.modules():
            if is_compiled(part) or isinstance(part, DistributedDataParallel):
                return Splitter(())
        return Splitter(module.parameters(), exact, fsdp.sharded(module), module.buffers())

    def record(self, then: Then | None = None) -> Tape:
        """A new tape; the forward runs inside ``with``.

        Args:
            then: gets the tape at the end of every pass over it, so that none has to be announced.
        """
        if self.mixed.watching and self.mixed.settled:
            for key in self.mixed.found:
                self.forget(key)
            self.stop_watching()
        return Tape(self, then)
