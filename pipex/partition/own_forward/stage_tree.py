"""The tree whose forward a stage runs: the model's own, with gates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipex.partition.own_forward.gates import Crossing, Gate
from pipex.partition.own_forward.tree import Bare, Parted, copy_of_loose, junk, nothing, rebind, shallow
from pipex.torch_internals import buffers_of, children_of, non_persistent_of, parameters_of


@dataclass(frozen=True, slots=True)
class Places:
    """What of a model stands where, without its tensors.

    Attributes:
        bare: the whole tree.
        gates: by id in it, paths.
        loose: by id in it.
        containers: paths, by id in it.
    """

    bare: nn.Module
    gates: Mapping[int, str]
    loose: frozenset[int]
    containers: Mapping[int, str]

    @classmethod
    def of(cls, model: nn.Module, parted: Parted, set_within: Collection[tuple[str, str]]) -> Places:
        """Of a model.

        Args:
            set_within: as of ``Record``.
        """
        made = Bare(model, parted, set_within)
        of = made.copies
        return cls(
            made.root, {id(of[id(m)]): path for path, m in (*parted.layers.items(), *parted.outer.items())},
            frozenset(id(of[id(m)]) for m in parted.loose.values()),
            {id(of[id(m)]): path for path, m in parted.containers.items()},
        )  # fmt: skip


Find = Callable[[], nn.Module]
FindTensor = Callable[[], Tensor]


class StageTree:
    """Args:
    places: of the model.
    modules: by path, what the stage has of layers and outer modules.
    tensors: by path, where it has what of the containers' own.
    device: of what it has no other of.
    """

    def __init__(
        self, places: Places, modules: Mapping[str, Find], tensors: Mapping[str, FindTensor], device: torch.device
    ) -> None:
        self._places, self._modules, self._tensors, self.device = places, modules, tensors, device
        self.nothing = nothing(device)
        self._made: dict[int, nn.Module] = {}
        self.gates: list[Gate] = []
        self._shared: list[tuple[dict[str, Any], str, FindTensor]] = []
        self._modes: list[tuple[nn.Module, bool | None]] = []  # None where it was the model's
        self.root = self._of(places.bare)
        rebind(self._made)

    def cross(self, crossing: Crossing | None) -> None:
        """Has the gates ask it from now on."""
        for gate in self.gates:
            vars(gate)["crossing"] = crossing
            if crossing is not None:
                vars(gate)["seeded"] = crossing.seed is not None

    def follow(self, training: bool) -> None:
        """The stage: into its mode, and to the tensors that it has now.

        Args:
            training: whether it is. Modules that were in another mode than the model are in training only if they were.
        """
        for module, of_its_own in self._modes:
            module.training = training and of_its_own is not False
        for tensors, name, find in self._shared:
            tensors[name] = find()

    def _keep_modes(self, modules: Iterable[nn.Module]) -> None:
        model = self._places.bare.training
        self._modes += [(module, None if module.training is model else module.training) for module in modules]

    def _of(self, bare: nn.Module) -> nn.Module:
        if id(bare) not in self._made:
            self._made[id(bare)] = self._new(bare)
        return self._made[id(bare)]

    def _new(self, bare: nn.Module) -> nn.Module:
        places = self._places
        if path := places.gates.get(id(bare)):
            gate = Gate(path, bare, self._modules.get(path), self.device)
            self.gates.append(gate)
            return gate
        if id(bare) in places.loose:
            made = copy_of_loose(bare).to(self.device)
            self._keep_modes(made.modules())
            return made
        made = shallow(bare)
        self._keep_modes([made])
        prefix = f"{places.containers[id(bare)]}." if places.containers[id(bare)] else ""
        for name, parameter in parameters_of(made).items():
            if find := self._tensors.get(prefix + name):
                self._shared.append((parameters_of(made), name, find))
            elif parameter is not None:
                form = junk(parameter.shape, parameter.dtype, self.device)
                parameters_of(made)[name] = nn.Parameter(form, requires_grad=False)
        for name, buffer in buffers_of(made).items():
            if find := self._tensors.get(prefix + name):
                self._shared.append((buffers_of(made), name, find))
            elif buffer is not None and name not in non_persistent_of(bare):
                buffers_of(made)[name] = junk(buffer.shape, buffer.dtype, self.device)
            else:
                buffers_of(made)[name] = None if buffer is None else buffer.detach().clone().to(self.device)
        self._made[id(bare)] = made
        for name, child in children_of(bare).items():
            children_of(made)[name] = None if child is None else self._of(child)
        return made
