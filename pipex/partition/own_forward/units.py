"""The units of a model that is cut by its own forward: what balances count as its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from pipex.partition.own_forward.record import Record
from pipex.partition.own_forward.rehearsal import Need
from pipex.partition.own_forward.tree import Parted
from pipex.partition.skeleton import Described
from pipex.torch_internals import buffers_of, non_persistent_of, parameters_of


class Unit(Described):
    """Holds the model's own modules that a unit calls, and tensors around them that are kept with it. It is not called.

    Args:
        kind: what it is, in words.
        modules: by path in the model.
        parameters, buffers: of containers, by path.
    """

    def __init__(
        self, kind: str, modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        super().__init__(kind)
        # A module's children have no dots in their names.
        self.names_of_modules = {path: str(number) for number, path in enumerate(modules)}
        self.names_of_parameters = {path: f"parameter{number}" for number, path in enumerate(parameters)}
        for path, module in modules.items():
            self.add_module(self.names_of_modules[path], module)
        for path, parameter in parameters.items():
            self.register_parameter(self.names_of_parameters[path], parameter)
        for number, buffer in enumerate(buffers.values()):
            self.register_buffer(f"buffer{number}", buffer)


def make_units(record: Record, parted: Parted, needs: Sequence[Need]) -> list[Unit]:
    """Everything that has tensors lands in a unit: what is called in those that call it, what is only read in those
    that read it, and what the sample's forward has not used in the first or the last one, as it stands in the model."""
    parameters, buffers = _of_containers(parted)
    paths = [list(dict.fromkeys(record.calls[call].path for call in unit)) for unit in record.units]
    held = [sorted(need.held) for need in needs]
    used = {path for own in (*paths, *held) for path in own}
    modules = parted.outer | parted.layers
    for path in modules:
        if path not in used:
            paths[0 if path in parted.ahead else -1].append(path)
    held[0] += [path for path in parameters if path not in used]
    return [
        Unit(
            _kind(modules, own), {path: modules[path] for path in (*own, *read) if path in modules},
            {path: parameters[path] for path in read if path in parameters}, {} if number else buffers,
        )
        for number, (own, read) in enumerate(zip(paths, held, strict=True))
    ]  # fmt: skip


def _kind(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> str:
    return ", ".join(type(modules[path]).__name__ for path in paths)


def _of_containers(parted: Parted) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Their own parameters, and those of their buffers that checkpoints hold."""
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    for path, container in parted.containers.items():
        prefix = f"{path}." if path else ""
        parameters |= {prefix + name: p for name, p in parameters_of(container).items() if p is not None}
        saved = buffers_of(container).keys() - non_persistent_of(container)
        buffers |= {prefix + name: b for name, b in buffers_of(container).items() if b is not None and name in saved}
    return parameters, buffers
