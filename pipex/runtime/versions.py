"""The versions of one stage's weights, where they change while micro-batches are under way.

A version is the tensors that the parameters had after so many updates; it is not written to while somebody needs it.
The parameters themselves stay the same objects, and what changes is their ``.data``, since autograd may save either:

    saved is              by                                 at the backward it is
    the parameter itself  x · gain, norms, custom functions  its ``.data`` then, set to the micro-batch's version
    a view or an alias    F.linear's Wᵀ, a tape's detach()   the memory of its forward, whatever ``.data`` is now

Outside of ``forward`` and ``backward`` the parameters have the newest version.

      memory  [a] ◄── newest                    [a] ◄── micro-batch 1, still under way: version 0
                                  update ─►     [b] ◄── newest: a copy of a, then the optimizer's step in place

Setting ``.data`` leaves autograd's counter of in-place changes alone, and the step is made to: it writes to memory that
no graph will read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor
from torch.nn import Parameter

from pipex.errors import UnsupportedModule
from pipex.runtime.memory import overlapping
from pipex.torch_internals import preserving_versions
from pipex.torch_internals import version as changes_of

Weights = Mapping[Parameter, Tensor]
"""Per parameter the tensor that it had, or is to have."""


class Versions:
    """Keeps what micro-batches under way need, and nothing longer.

    Versions are numbered as in ``Plan.versions``: by the updates since ``begin``; -1 is the one before the newest then.

    Args:
        parameters: gives the stage's parameters as they are now; asked at every update. Those that no update changes,
            frozen and without a gradient, have one version only.
        delayed: whether the version before the newest is kept too (``Plan.update``).
        others: gives what must not share memory with them: the stage's buffers.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[Parameter]],
        *,
        delayed: bool,
        others: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        self._parameters, self._delayed, self._others = parameters, delayed, others
        self._newest = 0
        self._older: dict[int, Weights] = {}
        self._under_way: dict[int, int] = {}  # micro-batch -> version
        self._written: dict[Parameter, int] = {}  # the counters of in-place changes when the older ones were made

    @property
    def held(self) -> int:
        """How many versions there are; never more than the plan's ``weight_versions``."""
        return 1 + len(self._older)

    @property
    def previous(self) -> Weights:
        """The version before the newest, of the parameters that differ in it; empty before the first update, and where
        it is not kept. With the parameters themselves it is what a run goes on from: give it to ``resume``."""
        return self._older.get(self._newest - 1, {}) if self._delayed else {}

    def begin(self) -> None:
        """A step begins: versions are counted anew. What was under way in one that did not end is forgotten; and so is
        the version before the newest, where somebody has written to the parameters since: it is of another run."""
        if any(changes_of(parameter) != written for parameter, written in self._written.items()):
            self.resume({})
        previous = self.previous
        self._under_way.clear()
        self._older = {-1: previous} if previous else {}
        self._newest = 0

    def resume(self, previous: Weights) -> None:
        """Takes ``previous`` for the version before the newest, between steps. Empty: it is the newest, as before the
        first update; which is right where somebody has given the parameters other values."""
        self._older = {self._newest - 1: dict(previous)} if previous and self._delayed else {}
        self._written = {parameter: changes_of(parameter) for parameter in previous}

    def forward(self, microbatch: int, version: int) -> AbstractContextManager[None]:
        """Around the F of a micro-batch, which uses this version until ``done``."""
        self._under_way[microbatch] = version
        return self._at(version)

    def backward(self, microbatch: int) -> AbstractContextManager[None]:
        """Around every I, W and B of the micro-batch."""
        return self._at(self._under_way[microbatch])

    def done(self, microbatch: int) -> None:
        """The micro-batch's last backward has run."""
        del self._under_way[microbatch]
        self._let_go()

    def update(self, step: Callable[[], object]) -> None:
        """Makes the next version, by ``step``, which changes the parameters in place: the optimizer's.

        Raises:
            UnsupportedModule: parameters share memory, so that copies of them would not be what they are.
        """
        changing = [p for p in self._parameters() if p.requires_grad or p.grad is not None]
        newest, self._newest = self._newest, self._newest + 1
        if self._delayed or newest in self._under_way.values():
            _refuse_shared(changing, self._others())
            # From here on nobody needs this one: its memory becomes that of the next.
            spare = self._older.pop(newest - 1, {}) if newest - 1 not in self._under_way.values() else {}
            self._older[newest] = {parameter: parameter.data for parameter in changing}
            for parameter in changing:
                parameter.data = _copy(parameter.data, spare.get(parameter))
        self._let_go()
        with preserving_versions(tuple(changing)):
            step()
        self._written = {parameter: changes_of(parameter) for parameter in changing} if self._delayed else {}

    def _let_go(self) -> None:
        needed = set(self._under_way.values()) | ({self._newest - 1} if self._delayed else set())
        for version in self._older.keys() - needed:
            del self._older[version]

    def _at(self, version: int) -> AbstractContextManager[None]:
        if version == self._newest:
            return _NEWEST
        weights = self._older.get(version)
        if weights is None:
            assert (version, self._newest) == (-1, 0), f"version {version} is not there; the newest is {self._newest}"
            return _NEWEST  # before the first update of all
        return _with_data(weights)


_NEWEST: AbstractContextManager[None] = nullcontext()


@contextmanager
def _with_data(weights: Weights) -> Iterator[None]:
    newest = {parameter: parameter.data for parameter in weights}
    _set(weights)
    try:
        yield
    finally:
        _set(newest)


def _set(weights: Weights) -> None:
    for parameter, data in weights.items():
        parameter.data = data


def _copy(data: Tensor, spare: Tensor | None) -> Tensor:
    if spare is None or (spare.shape, spare.stride(), spare.dtype, spare.device) != (
        data.shape, data.stride(), data.dtype, data.device,
    ):  # fmt: skip
        return data.clone()
    return spare.copy_(data)


def _refuse_shared(parameters: Iterable[Parameter], others: Iterable[Tensor]) -> None:
    """Raises UnsupportedModule if a parameter has memory in common with another one, or with one of the others."""
    held = [*((p, True) for p in parameters), *((tensor, False) for tensor in others)]
    for one_changes, other_changes in overlapping(held):
        if one_changes or other_changes:
            raise UnsupportedModule(
                "parameters that share memory, with each other or with a buffer, cannot have older versions",
                needed="one parameter in all places",
                fix="tie them by assigning the parameter itself, or use a synchronous schedule",
            )
