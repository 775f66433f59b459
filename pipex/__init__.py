"""pipex: pipeline parallelism for PyTorch whose backward is really split.

    stages = pipex.split_model(model, 4)
    plan = pipex.build("zb-h1", ranks=4, microbatches=8)
    pipeline = pipex.Pipeline(stages, plan, loss_fn, optimizer=lambda ps: torch.optim.AdamW(ps))
    loss = pipeline.step(batch, target)

    with pipex.drop_in():                  # or with torch.distributed.pipelining's own schedules
        schedule.step(batch, target=target)

Names are resolved on first use (PEP 562), so that planning does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipex import errors as errors
    from pipex import plan as plan
    from pipex.backward.drop_in import drop_in as drop_in
    from pipex.backward.stage_backward import stage_backward as stage_backward
    from pipex.backward.stage_backward import stage_backward_input as stage_backward_input
    from pipex.backward.stage_backward import stage_backward_weight as stage_backward_weight
    from pipex.errors import PipexError as PipexError
    from pipex.partition import build_stages as build_stages
    from pipex.partition import empty_model as empty_model
    from pipex.partition import profile_layers as profile_layers
    from pipex.partition import split_model as split_model
    from pipex.plan import build as build
    from pipex.plan.layer_costs import LayerCosts as LayerCosts
    from pipex.plan.search import search as search
    from pipex.runtime.launch import launch as launch
    from pipex.runtime.microbatch import Whole as Whole
    from pipex.runtime.pipeline import Pipeline as Pipeline
    from pipex.runtime.worlds import current_world as current_world

__version__ = "0.1.0"

_HOME = {
    "LayerCosts": "pipex.plan.layer_costs",
    "Pipeline": "pipex.runtime.pipeline",
    "PipexError": "pipex.errors",
    "Whole": "pipex.runtime.microbatch",
    "build": "pipex.plan",
    "build_stages": "pipex.partition",
    "current_world": "pipex.runtime.worlds",
    "drop_in": "pipex.backward.drop_in",
    "empty_model": "pipex.partition",
    "launch": "pipex.runtime.launch",
    "profile_layers": "pipex.partition",
    "search": "pipex.plan.search",
    "split_model": "pipex.partition",
    "stage_backward": "pipex.backward.stage_backward",
    "stage_backward_input": "pipex.backward.stage_backward",
    "stage_backward_weight": "pipex.backward.stage_backward",
}

_MODULES = ("errors", "plan")

__all__ = [*_HOME, *_MODULES, "__version__"]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"pipex.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'pipex' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
