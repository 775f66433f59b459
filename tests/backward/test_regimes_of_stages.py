"""How much of the weight gradients waits for W, counted in operations, where the stage itself is wrapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from module_kinds import KINDS, ROWS, TOKENS, WIDTH
from regimes import REGIMES, shares
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch_group import in_group

from pipex.bench.deferred import Shares

LEAST = 0.95

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf"
    ),  # torch.compile looks at it
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),  # returns a view, which nobody changes in place here
]


def sharded() -> nn.Module:
    return fully_shard(
        nn.Sequential(KINDS["mlp"](), KINDS["own parametrization"]()), mesh=init_device_mesh("cpu", (1,))
    )


def parallel() -> nn.Module:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(KINDS["mlp"](), init_device_mesh("cpu", (1,)), plan)


def compiled() -> nn.Module:
    module = KINDS["mlp"]()
    module.compile(backend="aot_eager")
    return module


STAGES: dict[str, Callable[[], nn.Module]] = {"FSDP2": sharded, "TP": parallel, "compiled": compiled}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("regime", ["plain", "bf16 autocast", "checkpointed"])
def test_weight_gradients_wait(stage: str, regime: str, tmp_path: Path) -> None:
    x = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)

    def counted() -> Shares:
        return shares(STAGES[stage], REGIMES[regime], x, warm_up=True)

    found = in_group(tmp_path / "store", 0, 1, counted)
    assert found.in_input + found.in_weight == found.whole, "nothing is computed twice"
    assert found.whole > found.for_inputs, "something is counted"
    assert found.deferred >= LEAST
