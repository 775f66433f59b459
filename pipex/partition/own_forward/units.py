"""The units of a model that is cut by its own forward: what balances count as its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from pipex.partition.own_forward.record import Record
from pipex.partition.own_forward.rehearsal import Need
from pipex.partition.own_forward.tree import Parted, tensors_of_containers
from pipex.partition.skeleton import Described


class Unit(Described):
    """Holds the model's own modules that a unit calls, and tensors around them that are kept with it. It is not called.

    Args:
        kind: what it is, in words.
        modules: by path in the model.
        tensors: of containers, parameters and buffers that checkpoints hold, by path.
    """

    def __init__(self, kind: str, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(kind)
        # A module's children have no dots in their names.
        self.names_of_modules = {path: str(number) for number, path in enumerate(modules)}
        self.names_of_tensors = {path: f"tensor{number}" for number, path in enumerate(tensors)}
        for path, module in modules.items():
            self.add_module(self.names_of_modules[path], module)
        for path, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(self.names_of_tensors[path], tensor)
            else:
                self.register_buffer(self.names_of_tensors[path], tensor)


def make_units(record: Record, parted: Parted, needs: Sequence[Need]) -> list[Unit]:
    """Everything that has tensors lands in a unit: what is called in those that call it, what is only read in those
    that read it, and what the sample's forward has not used in the first or the last one, as it stands in the model."""
    tensors = tensors_of_containers(parted)
    paths = [list(dict.fromkeys(record.calls[call].path for call in unit)) for unit in record.units]
    held = [sorted(need.held) for need in needs]
    used = {path for own in (*paths, *held) for path in own}
    modules = parted.outer | parted.layers
    for path in modules:
        if path not in used:
            paths[0 if path in parted.ahead else -1].append(path)
    held[0] += [path for path in tensors if path not in used]
    return [
        Unit(
            _kind(modules, own), {path: modules[path] for path in (*own, *read) if path in modules},
            {path: tensors[path] for path in read if path in tensors},
        )
        for own, read in zip(paths, held, strict=True)
    ]  # fmt: skip


def _kind(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> str:
    return ", ".join(type(modules[path]).__name__ for path in paths)
