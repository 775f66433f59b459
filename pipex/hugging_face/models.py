"""Models of which only the files are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from pipex.errors import InputError
from pipex.hugging_face.card import matches
from pipex.reading import read_file

LARGEST_CONFIGURATION = 16 << 20
"""Bytes; most have some thousand."""


def read_configuration(directory: Path) -> Any:
    """
    Raises:
        InputError: there is none, or transformers has no class for it.
    """
    from transformers import CONFIG_MAPPING

    path = directory / "config.json"
    try:
        content = json.loads(read_file(path, LARGEST_CONFIGURATION), object_hook=_number)
        configuration = CONFIG_MAPPING[content["model_type"]].from_dict(content)
    except Exception as error:  # transformers has many for what it finds in there
        got = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path} is no configuration of a model that transformers knows", got=got,
            needed="one that save_pretrained has written, of a model_type of transformers itself",
            fix="check the path; nothing is downloaded, and no code of a directory is run",
        ) from error  # fmt: skip
    configuration.name_or_path = str(directory)
    return configuration


def _number(value: dict[str, Any]) -> Any:
    """What JSON has no numbers for, as transformers writes it."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def build(configuration: Any, model_class: Any) -> nn.Module:
    """A model with initial values, and in the types in which ``from_pretrained`` would have it. Arguments and errors as
    of ``empty_model``."""
    import transformers

    names = configuration.architectures or []
    kind = model_class or next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    make = getattr(kind, "from_config", None) or getattr(kind, "_from_config", None)
    if make is None:
        raise InputError(
            "no class of transformers to build the model by", got=", ".join(names) or "no architectures in config.json",
            needed="one of its names", fix="pass model_class, such as transformers.AutoModelForCausalLM",
        )  # fmt: skip
    model: Any = make(configuration)
    kept = tuple(model._get_dtype_plan(model.dtype))  # in float32, whatever the others are in
    for name, parameter in model.named_parameters():
        if matches(name, kept):
            parameter.data = parameter.data.float()
    if model.can_generate() and Path(configuration.name_or_path, "generation_config.json").is_file():
        path = Path(configuration.name_or_path, "generation_config.json")
        model.generation_config = transformers.GenerationConfig.from_dict(
            json.loads(read_file(path, LARGEST_CONFIGURATION))
        )
    return model  # type: ignore[no-any-return]
