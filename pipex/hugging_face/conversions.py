"""How transformers converts tensors on their way to files and back: renamed, taken apart, put together, transposed.

Its experts, for one, are a tensor each in files, and one for all of a layer in a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipex.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that one conversion takes together.

    Attributes:
        sources: their names, and by which pattern the converter knows each.
        target: the name of the first tensor that they become.
        converter: transformers' ``WeightConverter``; None: the one tensor is only called otherwise.
    """

    sources: Mapping[str, str]
    target: str
    converter: Any = None


@dataclass(frozen=True, slots=True)
class Known:
    """A model as its conversions see it: transformers asks for its configuration and for the shapes of its parameters.

    Attributes:
        forms: of all tensors that the model saves, on the meta device, by name.
        to_files, to_model: transformers' conversions of each direction, in order.
        base_model_prefix: in the names of a model with a head, of which files may be of the model without it.
    """

    config: Any
    forms: dict[str, Tensor]
    to_files: Sequence[Any] = ()
    to_model: Sequence[Any] = ()
    base_model_prefix: str = ""

    @classmethod
    def of(cls, model: Any, state: Mapping[str, Tensor]) -> Known:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        forms = {name: form_of(tensor) for name, tensor in state.items()}
        used = getattr(model, "_weight_conversions", None)
        if used is None:  # not of from_pretrained: then no file has told whether it has the prefix
            all_of_it = get_model_conversion_mapping(model, add_legacy=False)
            used = [conversion for conversion in all_of_it if not isinstance(conversion, PrefixChange)]
        reverse = [conversion.reverse_transform() for conversion in reversed(used)]
        config = copy.deepcopy(model.config)
        return cls(config, forms, reverse, get_model_conversion_mapping(model), model.base_model_prefix)

    def get_parameter(self, name: str) -> Tensor:
        return self.forms[name]

    def groups_for_files(self, names: Iterable[str]) -> list[Group]:
        if not self.to_files:
            return [Group({name: name}, name) for name in names]
        from transformers.core_model_loading import apply_converters, apply_renamings

        renamings, converters = _kinds(self.to_files)

        def renamed(name: str) -> tuple[str, str | None]:
            target, pattern = apply_converters(name, converters)
            return (target, pattern) if pattern is not None else (apply_renamings(name, renamings), None)

        return _grouped(names, renamed, converters)

    def groups_from_files(self, names: Iterable[str]) -> list[Group]:
        if not self.to_model:
            return [Group({name: name}, name) for name in names]
        from transformers.core_model_loading import rename_source_key

        renamings, converters = _kinds(self.to_model)

        def renamed(name: str) -> tuple[str, str | None]:
            target, pattern = rename_source_key(name, renamings, converters, self.base_model_prefix, self.forms)
            if target not in self.forms and name in self.forms:
                target, pattern = rename_source_key(name, [], [], self.base_model_prefix, self.forms)
            return target, pattern

        return _grouped(names, renamed, converters)

    def converted(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Raises:
            CheckpointError: transformers cannot convert them so.
        """
        if group.converter is None:
            (tensor,) = tensors.values()
            return {group.target: tensor}
        converter = copy.deepcopy(group.converter)
        for name, pattern in group.sources.items():
            converter.add_tensor(group.target, name, pattern, tensors[name])
        try:
            found = converter.convert(group.target, model=self, config=self.config)
        except Exception as error:  # whatever a conversion of somebody else raises
            raise CheckpointError(
                f"{group.target} cannot be converted", got=f"{type(error).__name__}: {error}",
                needed=f"what transformers makes of {', '.join(group.sources)}",
            ) from error  # fmt: skip
        return {name: one[0] if isinstance(one, list) else one for name, one in found.items()}

    def converted_back(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raises: as ``converted``."""
        found = self.converted(group, tensors)
        if group.converter is None:
            return found
        from transformers.core_model_loading import apply_renamings

        renamings, _ = _kinds(self.to_files)
        return {apply_renamings(name, renamings): tensor for name, tensor in found.items()}


def _kinds(conversions: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Fresh renamings and converters: some of them remember the names that they have seen."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    fresh = copy.deepcopy(list(conversions))
    return [c for c in fresh if isinstance(c, WeightRenaming)], [c for c in fresh if isinstance(c, WeightConverter)]


def _grouped(
    names: Iterable[str], renamed: Callable[[str], tuple[str, str | None]], converters: Collection[Any]
) -> list[Group]:
    from transformers.core_model_loading import dot_natural_key

    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[tuple[str, bool], dict[str, str]] = {}
    groups: list[Group] = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = renamed(name)
        key = target, pattern is not None
        if pattern is None or key not in sources:
            sources[key] = {}
            groups.append(Group(sources[key], target, None if pattern is None else of_pattern[pattern]))
        sources[key][name] = pattern or name
    return groups


def form_of(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
