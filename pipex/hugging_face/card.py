"""What a stage knows of the files of the model that it is of."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipex.errors import CheckpointError
from pipex.hugging_face.conversions import Group, Known, form_of


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
    known: Known
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
    base = _base_of(model)
    wanted = "config", "save_pretrained", "base_model_prefix", "_tied_weights_keys"
    if not all(hasattr(base, name) for name in wanted):
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


def _base_of(model: Any) -> Any:
    return model.get_base_model() if _is_adapted(model) else model


def _is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


# A whole model.


def _whole(model: Any) -> Part:
    state = _state(model)
    first = {id(tensor): name for name, tensor in _once(model)}
    meant = {name: first[id(tensor)] for name, tensor in state.items() if id(tensor) in first}
    ignored = _patterns(model, "_keys_to_ignore_on_save")
    kept = [name for name in _untied(model, meant) if not matches(name, ignored)]
    known = Known.of(model, state)
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
    embeddings: Any = "auto" if source is None or Path(source, "config.json").is_file() else _targets_embeddings(config)
    state = _state(model)
    saved = get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=embeddings)
    first = {id(tensor): name for name, tensor in _once(model)}
    if made := [key for key, tensor in saved.items() if id(tensor) not in first]:
        raise CheckpointError(f"PEFT computes {made[0]} ({config.peft_type}) when it saves, from the whole model")
    names = {key: first[id(tensor)] for key, tensor in saved.items()}
    mapping = None
    if config.task_type is None:
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    known = Known(config, {key: form_of(tensor) for key, tensor in saved.items()})
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
