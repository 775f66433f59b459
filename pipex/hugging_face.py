"""What pipex knows of transformers and PEFT: how the files of a model call its tensors, and in which form they keep
them.

Neither package is needed by the rest of pipex, and neither is imported before a model of theirs is there. A ``Card`` is
made from the model before it is cut, and says without it (of which a rank may hold a stage only) how to write and to
read such files.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
class Part:
    """Tensors that lie in files of one folder: those of a model, or of one of its adapters.

    Attributes:
        folder: below the directory; empty: the directory itself.
        stem: of the names of the files, such as ``model``.
        one_file: whether its readers know no way to have several.
        settings: what writes the other files, such as ``config.json``.
        names: by the names that tensors have before they are converted for files, those that they have in a stage.
        meant: the same, of the other names of tied tensors too.
        groups: what is converted together on the way to files.
        shapes: of the tensors in the files, by the names that they have there.
        known: the model, as conversions need it.
        unread: patterns of names in files that are left aside.
        unsaved: patterns of names that files may lack.
    """

    folder: str
    stem: str
    one_file: bool
    settings: _Settings
    names: Mapping[str, str]
    meant: Mapping[str, str]
    groups: Sequence[Group]
    shapes: Mapping[str, tuple[int, ...]]
    known: _Known
    unread: tuple[str, ...] = ()
    unsaved: tuple[str, ...] = ()

    def for_files(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a group is in files. ``tensors``: of the names before conversion."""
        return self.known.converted_back(group, tensors)

    def groups_of(self, names: Iterable[str]) -> list[Group]:
        """What is converted together on the way from files, which hold these names."""
        return self.known.groups_from_files(names)

    def from_files(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a group of tensors in files is in the model, by the names there.

        Raises:
            CheckpointError: it cannot be converted.
        """
        return self.known.converted(group, tensors)


@dataclass(frozen=True, slots=True)
class Card:
    """What every stage of a model knows of its files; the same on every rank, and without a tensor's memory.

    Attributes:
        kind: the class of the model.
        parts: of a model with adapters these alone.
        refused: why no such files can be written or read, in words.
    """

    kind: str
    parts: tuple[Part, ...] = ()
    refused: str = ""


def card_of(model: nn.Module) -> Card | None:
    """The card of a model of transformers or PEFT; None of any other. To be made before the model is cut."""
    base = model.get_base_model() if _is_adapted(model) else model
    if not all(hasattr(base, name) for name in ("config", "save_pretrained", "base_model_prefix", "_tied_weights_keys")):
        return None
    kind = type(model).__name__
    try:
        if getattr(base, "hf_quantizer", None) is not None:
            raise CheckpointError("its weights are quantized")
        if getattr(base, "_hf_peft_config_loaded", False):
            raise CheckpointError("its adapters were added by transformers", fix="add them by peft.get_peft_model")
        parts = _adapters(model) if _is_adapted(model) else (_whole(model),)
    except CheckpointError as why:
        return Card(kind, refused=str(why))
    return Card(kind, parts)


def _is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


# A whole model.


def _whole(model: Any) -> Part:
    state = _state(model)
    first = {id(tensor): name for name, tensor in _once(model)}
    meant = {name: first[id(tensor)] for name, tensor in state.items() if id(tensor) in first}
    ignored = _patterns(model, "_keys_to_ignore_on_save")
    kept = [name for name in _untied(model, meant) if not matches(name, ignored)]
    known = _Known.of(model, state)
    groups = known.groups_for_files(kept)
    shapes: dict[str, tuple[int, ...]] = {}
    for group in groups:
        for name, tensor in known.converted_back(group, {name: known.forms[name] for name in group.sources}).items():
            shapes[name] = tuple(tensor.shape)
    generation = model.generation_config if model.can_generate() else None
    # Buffers that files of older versions of transformers hold; it leaves them aside too.
    buffers = [name for name, _ in model.named_buffers()]
    old = [r"rotary_emb\.inv_freq"] if any(name.endswith("rotary_emb.inv_freq") for name in buffers) else []
    old += [r"(^|\.)position_ids$"] if any(name.endswith("position_ids") for name in buffers) else []
    return Part(
        "", "model", False, _ModelSettings(type(model), copy.deepcopy(model.config), copy.deepcopy(generation)),
        {name: meant[name] for name in kept}, meant, groups, shapes, known,
        (*_patterns(model, "_keys_to_ignore_on_load_unexpected"), *old),
        (*_patterns(model, "_keys_to_ignore_on_load_missing"), *ignored),
    )  # fmt: skip


def _untied(model: nn.Module, meant: Mapping[str, str]) -> list[str]:
    """Of each tensor the name by which transformers saves it.

    Raises:
        CheckpointError: what is tied in the model would not be in one that is read again.
    """
    tied: list[str] = []
    for path, module in model.named_modules():
        tied += [f"{path}.{name}" if path else name for name in getattr(module, "_tied_weights_keys", None) or ()]
    names: dict[str, list[str]] = {}
    for name, first in meant.items():
        names.setdefault(first, []).append(name)
    kept = []
    for same in names.values():
        own = [name for name in same if not matches(name, tied)] or [max(same)]
        if len(own) > 1:
            raise CheckpointError(
                "the class does not say that two of its tensors are one", got=f"{own[0]} and {own[1]}",
                needed="the other's name in _tied_weights_keys",
            )  # fmt: skip
        kept += own
    return kept


def _patterns(model: nn.Module, name: str) -> tuple[str, ...]:
    return tuple(getattr(model, name, None) or ())


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the regular expressions is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that are saved, a tied one under each of its names; themselves."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}


def _once(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


# Adapters.


def _adapters(model: Any) -> tuple[Part, ...]:
    return tuple(_adapter(model, name) for name in model.peft_config)


def _adapter(model: Any, name: str) -> Part:
    from peft import get_peft_model_state_dict

    config, base = copy.deepcopy(model.peft_config[name]), model.get_base_model()
    if getattr(config, "is_prompt_learning", False):
        raise CheckpointError(f"its adapter {name!r} is a prompt ({config.peft_type}), which no layer holds")
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    config.inference_mode = True
    # Whether the vocabulary was resized, PEFT would ask the hub if the base model is not here.
    source = config.base_model_name_or_path
    embeddings = "auto" if source is None or Path(source, "config.json").is_file() else _targets_embeddings(config)
    state = _state(model)
    saved = get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=embeddings)
    first = {id(tensor): name for name, tensor in _once(model)}
    if made := [key for key, tensor in saved.items() if id(tensor) not in first]:
        raise CheckpointError(f"PEFT computes {made[0]} ({config.peft_type}) when it saves, from the whole model")
    names = {key: first[id(tensor)] for key, tensor in saved.items()}
    mapping = None
    if config.task_type is None:
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    known = _Known(config, {key: _form(tensor) for key, tensor in saved.items()})
    return Part(
        "" if name == "default" else name, "adapter_model", True, _AdapterSettings(config, mapping), names, names,
        known.groups_for_files(names), {key: tuple(tensor.shape) for key, tensor in saved.items()}, known,
    )  # fmt: skip


def _targets_embeddings(config: Any) -> bool:
    from peft.utils.other import EMBEDDING_LAYER_NAMES

    targets = getattr(config, "target_modules", None) or ()
    if isinstance(targets, str):
        return any(re.search(rf"(^|[.|(]){name}($|[.|)])", targets) for name in EMBEDDING_LAYER_NAMES)
    return any(name in targets for name in EMBEDDING_LAYER_NAMES)


# Settings.


class _Settings:
    def write(self, directory: Path, dtype: torch.dtype | None) -> None:
        """Writes the files beside the tensors into a directory that is there. ``dtype``: of the model."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _ModelSettings(_Settings):
    """Configurations of a class, and of how it generates."""

    kind: type[nn.Module]
    config: Any
    generation: Any

    def write(self, directory: Path, dtype: torch.dtype | None) -> None:
        config = copy.deepcopy(self.config)
        if dtype is not None:
            config.dtype = str(dtype).removeprefix("torch.")
        config.architectures = [self.kind.__name__]
        if getattr(self.kind, "_auto_class", None) is not None:  # of no version of transformers: its code goes along
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(self.kind.__new__(self.kind), directory, config=config)
        config.save_pretrained(directory)
        if self.generation is not None:
            self.generation.save_pretrained(directory)


@dataclass(frozen=True, slots=True)
class _AdapterSettings(_Settings):
    """An adapter's configuration; ``mapping``: of which class the base model is, where no task says it."""

    config: Any
    mapping: Mapping[str, str] | None

    def write(self, directory: Path, dtype: torch.dtype | None) -> None:
        self.config.save_pretrained(str(directory), auto_mapping_dict=self.mapping)


# Conversions.


@dataclass(frozen=True, slots=True)
class _Known:
    """A model as its conversions see it: transformers asks for its configuration and for the shapes of its parameters.

    Attributes:
        forms: of all tensors that the model saves, on the meta device, by name.
        to_files, to_model: transformers' conversions of each direction, in order.
        base_model_prefix: in the names of a model with a head, of which files may be of the model without it.
    """

    config: Any
    forms: Mapping[str, Tensor]
    to_files: Sequence[Any] = ()
    to_model: Sequence[Any] = ()
    base_model_prefix: str = ""

    @classmethod
    def of(cls, model: Any, state: Mapping[str, Tensor]) -> _Known:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        forms = {name: _form(tensor) for name, tensor in state.items()}
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


def _form(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
