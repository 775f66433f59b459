"""How a rank's memory grows with its stages: ``python resident.py whole|built|meta`` prints it as JSON, for 4 ranks.

In a process of its own, since what an allocator has done before decides what it gives back.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path

import host_world
import torch
import torch.nn.functional as F
from torch import nn

import pipex

LAYERS, WIDTH, RANKS = 16, 2048, 4


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def layer(number: int) -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, bias=False)


def grown(how: str) -> tuple[float, float, int]:
    """By how much the memory has grown when a pipeline is made, and how much it has grown at most, over its own
    stages'; and the bytes of all stages as the pipeline shows them."""
    plan = pipex.build("1f1b", pipex.current_world().ranks, 4)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of the parent before
    before = resident()
    if how == "built":
        stages = pipex.build_stages(layer, LAYERS, plan, pipex.current_world().rank)
    else:
        with torch.device("meta" if how == "meta" else "cpu"):
            model = nn.Sequential(*map(layer, range(LAYERS)))
        stages = pipex.split_model(model, plan)
        del model
    pipe = pipex.Pipeline(stages, plan, F.mse_loss, optimizer=torch.optim.SGD)
    if how == "meta":
        for parameter in (p for stage in pipe.local_stages for p in stage.parameters()):
            parameter.data.fill_(1)  # as a load does
    del stages
    gc.collect()
    own, whole = (
        sum(p.nbytes for stage in some for p in stage.parameters()) for some in (pipe.local_stages, pipe.stages)
    )
    return (resident() - before) / own, (peak() - before) / own, whole


if __name__ == "__main__":
    print(json.dumps(host_world.launch(grown, RANKS, args=(sys.argv[1],))))
