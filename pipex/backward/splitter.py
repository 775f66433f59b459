"""Splitters: where a stage's split backward begins."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipex.backward import fsdp
from pipex.backward.own import Own
from pipex.backward.passes import Then, at_once
from pipex.backward.recordable import Recordable
from pipex.backward.tape import Tape
from pipex.backward.torch_internals import import_backends
from pipex.torch_internals import is_compiled


class Splitter(Recordable):
    """Makes tapes for one stage. Arguments and errors as of ``Recordable``."""

    @staticmethod
    def of(module: nn.Module, exact: bool | None = None) -> Splitter:
        """For all parameters of the module; none where they must not be deferred, since DDP waits for them.

        Raises:
            UnsupportedModule: as ``Own.refuse_replicated``.
        """
        own = Own(module)
        for part in module.modules():
            if isinstance(part, DistributedDataParallel):
                Own(part).refuse_replicated()
                return Splitter((), own=own)
        if any(map(is_compiled, module.modules())):
            import_backends()
        return Splitter(module.parameters(), exact, fsdp.sharded(module), module.buffers(), own)

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

    def whole(self) -> AbstractContextManager[object]:
        """Around a forward whose backward is not split: what modules of the stage leave to W all the same, the end of a
        pass makes."""
        return self.record(at_once) if self.own else _ALONE


_ALONE = nullcontext()
