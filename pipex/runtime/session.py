"""What a pipeline is between its steps: alive or not, made of parts, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic_ns
from typing import Any

import torch

from pipex.errors import CheckpointError, InputError, PipexError
from pipex.observe import Event, Observer
from pipex.partition import Stage
from pipex.runtime import checkpoint, pretrained
from pipex.runtime.pairs import Pairs
from pipex.runtime.parts import Parts
from pipex.runtime.worlds import current_world
from pipex.state import Stateful
from pipex.transport.interface import Buffers, Phase


class Session:
    """What a ``Pipeline`` is between its steps.

    Attributes:
        world: the ranks.
        steps: updates made; of asynchronous plans steps, each of which makes several.
    """

    _parts: Parts

    def __init__(self, observer: Observer | None) -> None:
        self.world = current_world()
        self.steps = 0
        self._observer = observer
        self._failed: BaseException | None = None
        self._closed = False
        self._without_values = False  # until a load

    @property
    def local_stages(self) -> list[Stage]:
        """The stages that this rank holds, in order."""
        return self._parts.local_stages

    @property
    def peak_activations(self) -> int:
        """Most micro-batches that this rank has held at once, over its stages: from F to the end of B or W, or from I
        on where a stage is recomputed. Those in host memory count too."""
        return self._parts.executor.peak_live

    @property
    def pairs(self) -> Pairs:
        """Of the last step: how many of this rank's fused pairs have run as one, and why the others have not."""
        executor = self._parts.executor
        fused = sum(bool(action.parts) for action in self._parts.layout.plan.orders[self.world.rank])
        return Pairs(executor.pairs_at_once, fused, executor.why_apart)

    @property
    def buffers(self) -> dict[str, Buffers]:
        """Per edge that this rank sends on, the memory of its buffers and how often they have grown."""
        return {f"{kind} {source}→{to}": end.buffers for (source, to, kind), end in self._parts.links.senders.items()}

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """This rank's, as ``optimizer=`` has made it: for schedules of the learning rate, and new parameters."""
        return self._parts.update.optimizer

    @property
    def gradient_norm(self) -> float | None:
        """2-norm of all gradients at the last update, before clipping; None unless it was clipped or guarded."""
        return self._parts.update.norm

    def save(
        self, directory: str | os.PathLike[str], meta: dict[str, Any] | None = None, *,
        state: Mapping[str, Stateful] | None = None,
    ) -> None:  # fmt: skip
        """Collective: writes model and optimizer; the directory's old checkpoint stays until the new one is whole.

        Args:
            meta: anything JSON can hold; ``load`` returns it.
            state: what else this rank goes on from, by name, such as ``{"scheduler": scheduler}``: objects with
                ``state_dict`` and ``load_state_dict``. Every rank saves its own.

        Raises:
            CheckpointError: it cannot be written; the old checkpoint is untouched. InputError: the model has no values.
        """
        self._check_alive(values=True)
        with self._together():
            self.world.at(self.steps, Phase.SAVING)
            problem = checkpoint.save(
                self.world, self.local_stages, self.optimizer, state or {}, self.steps, directory, meta or {},
                self._parts.update.main, self._parts.versions, self._parts.layout.owners,
            )  # fmt: skip
            self.world.at(self.steps, Phase.IDLE)
        if problem is not None:
            raise CheckpointError(problem)  # on every rank; the pipeline itself can go on

    def load(self, directory: str | os.PathLike[str], *, state: Mapping[str, Stateful] | None = None) -> dict[str, Any]:
        """Collective: restores model, optimizer and step count, from any number of ranks. Returns the ``meta`` of
        ``save``.

        Args:
            state: the objects to restore, by the names that they were saved under. On as many ranks as saved them each
                gets its own state back; on another number they must have been the same on all ranks.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another model. Then nothing has changed on any
                rank: the pipeline can go on, or load another. Only where a ``load_state_dict`` fails, this rank's
                pipeline is at an end.
        """
        update = self._parts.update
        with self._together():
            found = checkpoint.load(
                self.world, self.local_stages, self.optimizer, state or {}, directory, update.main,
                self._parts.versions,
            )  # fmt: skip
            if not isinstance(found, str):
                self.steps, meta = found
                update.loaded()
                self._without_values = False
                return meta
        raise CheckpointError(found)  # on every rank

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Collective: writes the model as its own ``save_pretrained`` would, for ``from_pretrained``; each rank its own
        stages, into a directory that all share. Of a PEFT model it is the adapters.

        The tensors lie in ``model.safetensors`` if one rank writes them all and they are few, else in
        ``model-0000k-of-0000n.safetensors`` with an index. Those of a save before stay readable until these are whole.

        Raises:
            CheckpointError: they cannot be written, or the stages are of no model of transformers or PEFT, or not any
                more; the directory is as it was. InputError: the model has no values.
        """
        self._check_alive(values=True)
        with self._together():
            self.world.at(self.steps, Phase.SAVING)
            problem = pretrained.save(self.world, self.local_stages, directory, self._parts.layout.owners)
            self.world.at(self.steps, Phase.IDLE)
        if problem is not None:
            raise CheckpointError(problem)

    def load_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Collective: the model's tensors become those that ``save_pretrained`` (transformers' own, PEFT's or a
        pipeline's) has written into a directory; each rank reads its own stages. Nothing is downloaded or executed.
        Values are rounded to the types of the model. Optimizer and step count stay.

        Raises:
            CheckpointError: there are no such files, they are damaged, or of another model: lists the names that are
                missing, not the model's, or of another shape. Then nothing has changed on any rank.
        """
        update, versions = self._parts.update, self._parts.versions
        with self._together():
            problem = pretrained.load(self.world, self.local_stages, directory, update.main, self._without_values)
            if problem is None:
                update.loaded()
                if versions is not None:
                    versions.resume({})
                self._without_values = False
                return
        raise CheckpointError(problem)

    def close(self) -> None:
        """Frees the buffers between ranks; what needs them is a PipexError afterwards. Safe to repeat;
        ``pipex.launch`` ends the world itself."""
        self._closed = True
        self._parts.executor.disconnect()
        self._parts.links.close()

    # Failure and progress.

    def _check_alive(self, *, buffers: bool = False, values: bool = False) -> None:
        if self._failed is not None:
            why = str(self._failed) or type(self._failed).__name__
            raise PipexError(f"this pipeline has failed before ({why}); start a new run") from self._failed
        if buffers and self._closed:
            raise PipexError("this pipeline is closed, and its buffers are gone; make a new one")
        if values and self._without_values:
            raise InputError("the model has no values yet", got="one that was made on the meta device",
                             needed="load or load_pretrained first, or a model of pipex.build_stages")  # fmt: skip

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What fails here fails on every rank."""
        self._check_alive()
        try:
            yield
        except BaseException as error:
            self._failed = error
            self.world.fail(error)
            raise

    def _phase(self, step: int, phase: Phase) -> int:
        self.world.at(step, phase)
        return monotonic_ns()

    def _done(self, begin: int, step: int, phase: Phase) -> None:
        if self._observer is not None:
            self._observer(Event(step, phase.name.lower(), -1, -1, begin, monotonic_ns()))
