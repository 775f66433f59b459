"""Bytes of memory that a piece of work leaves behind, counted by storage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from pipex.torch_internals import TorchDispatchMode, storage_id, tree_leaves


class Storages(TorchDispatchMode):
    """Inside ``with``, sees every storage that an operation returns, also in backward passes, and holds none of them.

    It need not know who keeps what: a saved tensor, a captured gradient and a forgotten reference count alike, views of
    one storage count once, and what has been freed does not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By address, which is not used again while there is a weak reference.
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage_id(storage) not in self._seen:
                    self._seen[storage_id(storage)] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        return result

    def alive(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of those that still exist, without the parameters and their gradients."""
        lasting = [t for p in parameters for t in (p, p.grad) if t is not None]
        addresses = {storage_id(tensor.untyped_storage()) for tensor in lasting}
        held = [
            nbytes
            for address, (storage, nbytes) in self._seen.items()
            if address not in addresses and not storage.expired()  # type: ignore[no-untyped-call]
        ]
        return sum(held)
