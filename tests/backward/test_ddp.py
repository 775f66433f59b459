"""Stages in DistributedDataParallel: their weight gradients wait, and their buckets leave in the last W."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from replicated_steps import Cast, Checkpointed, Job, Seen, Spare, check, results
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel


def replicated(module: nn.Module, mesh: DeviceMesh, seen: Seen, **options: Any) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda _, name=name: seen.hooks.update([f"gradient of {name}"]))
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.hooks.update([f"sum of {name}"]))
    return DistributedDataParallel(module, process_group=mesh.get_group(), **options)


UNUSED = {"find_unused_parameters": True}
JOBS = {
    "plain": Job(replicated),
    "gradients in buckets": Job(partial(replicated, gradient_as_bucket_view=True), clear=False),
    "all parameters used, unknown to DDP": Job(partial(replicated, **UNUSED)),
    "unused parameters": Job(partial(replicated, **UNUSED), block=Spare),
    "autocast": Job(replicated, block=Cast),
    "checkpoints": Job(replicated, block=Checkpointed),
    "a V": Job(replicated, pipe=2, schedule="ZBVZeroBubble"),
    "interleaved": Job(replicated, pipe=2, schedule="InterleavedZeroBubble"),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_weight_gradients_wait_and_have_the_bits_of_torch_s_whole_backward(tmp_path: Path, job: Job) -> None:
    check(*results(job, tmp_path / "store"), whole=bool(job.schedule))
