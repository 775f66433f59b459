"""A model whose stages are trained on several ranks: on each, it has the old weights of all the other ranks' stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from pipex.errors import CheckpointError
from pipex.partition import Stage


def refuse_stale_saves(stages: Sequence[Stage]) -> None:
    """Lets ``save_pretrained`` of the model that the stages were made from, and of models in it, raise from here on."""
    model = None if stages[0].model is None else stages[0].model()
    for module in () if model is None else model.modules():
        if callable(getattr(module, "save_pretrained", None)):
            # On the object, and a function of this module: nothing is held by it, and a copy of the model has it too.
            object.__setattr__(module, "save_pretrained", _refuse)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise CheckpointError(
        "this model has been cut into stages of several ranks, and knows nothing of what the others have trained",
        got="save_pretrained of the model", needed="the weights of all ranks",
        fix="call pipeline.save_pretrained(directory) on every rank",
    )  # fmt: skip
