"""Stages in DistributedDataParallel: their weight gradients wait, and their buckets leave in the last W."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import persistent
import pytest
import torch
from replicated_steps import Adapted, Cast, Checkpointed, Job, Seen, Spare, check, results
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch_group import in_group

from pipex.backward.ddp import reduce
from pipex.backward.splitter import Splitter
from pipex.backward.uses import LinearUse


def replicated(module: nn.Module, mesh: DeviceMesh, seen: Seen, **options: Any) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda _, name=name: seen.hooks.update([f"gradient of {name}"]))
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.hooks.update([f"sum of {name}"]))
    return DistributedDataParallel(module, process_group=mesh.get_group(), **options)


def sparse(module: nn.Module, mesh: DeviceMesh, seen: Seen) -> nn.Module:
    table = module[0]
    if isinstance(table, nn.Embedding):
        module[0] = nn.Embedding.from_pretrained(table.weight.detach(), freeze=False, sparse=True)
    return replicated(module, mesh, seen)


UNUSED = {"find_unused_parameters": True}
JOBS = {
    "plain": Job(replicated),
    "gradients in buckets": Job(partial(replicated, gradient_as_bucket_view=True), clear=False),
    "all parameters used, unknown to DDP": Job(partial(replicated, **UNUSED)),
    "unused parameters": Job(partial(replicated, **UNUSED), block=Spare),
    "a parameter with sparse gradients": Job(sparse),
    "weights made of parameters": Job(replicated, block=Adapted),
    "autocast": Job(replicated, block=Cast),
    "checkpoints": Job(replicated, block=Checkpointed),
    "a V": Job(replicated, pipe=2, schedule="ZBVZeroBubble"),
    "interleaved": Job(replicated, pipe=2, schedule="InterleavedZeroBubble"),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_weight_gradients_wait_and_have_the_bits_of_torch_s_whole_backward(tmp_path: Path, job: Job) -> None:
    check(*results(job, tmp_path / "store"), whole=bool(job.schedule))


def without_hooks(module: nn.Module, mesh: DeviceMesh, _: Seen) -> nn.Module:
    return DistributedDataParallel(module, process_group=mesh.get_group())


def test_products_that_are_made_together_are_in_before_the_reduction(tmp_path: Path) -> None:
    ours, theirs = results(Job(without_hooks, fused=True), tmp_path / "store")
    for our, their in zip(ours, theirs, strict=True):
        for found, wanted in zip(our.gradients, their.gradients, strict=True):
            for gradient, reference in zip(found, wanted, strict=True):
                torch.testing.assert_close(torch.from_numpy(gradient), torch.from_numpy(reference))


def bucketed(module: nn.Module, mesh: DeviceMesh, seen: Seen) -> nn.Module:
    """In buckets for little more than a parameter each, from the second step on."""
    found = DistributedDataParallel(module, process_group=mesh.get_group(), bucket_cap_mb=1e-4)
    names = {id(parameter): name for name, parameter in module.named_parameters()}

    def noted(state: Any, bucket: Any) -> Any:
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            seen.note(f"bucket {names[id(parameter)]} {gradient.numpy().tobytes().hex()}")
        return allreduce_hook(state, bucket)

    # DDP takes no annotation but its own, and no text for that.
    found.register_comm_hook(mesh.get_group(), lambda state, bucket: noted(state, bucket))
    return found


def test_buckets_leave_as_their_gradients_are_made_with_what_they_hold_without_the_split(tmp_path: Path) -> None:
    ours, theirs = results(Job(bucketed), tmp_path / "store")
    check(ours, theirs)
    for our, their in zip(ours, theirs, strict=True):
        held = [sorted(event for event, _ in seen.events if event.startswith("bucket")) for seen in (our, their)]
        assert held[0] == held[1]
        text = " ".join("end" if re.fullmatch(r"[IW]\d", event) else event.split()[0] for event, _ in our.events)
        last = [action for action in text.split(" end ") if "bucket" in action]
        assert len(last) == 4  # of two stages in two steps
        for action in last[2:]:
            assert action.rindex("product") > action.index("bucket", action.index("product"))


def told() -> tuple[bytes, bytes, int]:
    """Bits of a gradient before DDP is told that it is complete and afterwards, and how often its hooks ran then."""
    module = DistributedDataParallel(nn.Linear(4, 1))
    weight, calls = module.module.weight, []
    weight.register_hook(lambda _: calls.append("gradient"))
    weight.register_post_accumulate_grad_hook(lambda _: calls.append("sum"))
    accumulator = get_gradient_edge(weight).node
    accumulator.register_prehook(lambda _: calls.append("before"))
    accumulator.register_hook(lambda *_: calls.append("after"))
    with module.no_sync():
        module(torch.ones(1, 4)).sum().backward()
    weight.grad.copy_(torch.tensor([[-0.0, 0.0, 1.5, float("nan")]]))
    before, ran = weight.grad.numpy().tobytes(), len(calls)
    reduce(module, [])
    return before, weight.grad.numpy().tobytes(), len(calls) - ran


def test_a_gradient_that_is_complete_keeps_its_bits_and_its_hooks_do_not_run_again(tmp_path: Path) -> None:
    [(before, after, calls)] = persistent.ranks.results([partial(in_group, tmp_path / "store", 0, 1, told)])
    assert after == before
    assert calls == 0


def whole_backward_with_unknown_targets() -> bool:
    """W of a use that does not say whose gradients it gives, against a backward without the split."""
    torch.manual_seed(0)
    module = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    plain = copy.deepcopy(module.module)
    splitter = Splitter.of(module.module)
    x = torch.randn(5, 4)
    with splitter.record() as tape, module.no_sync():
        y = module(x)
    with module.no_sync():
        tape.backward_input([y], [torch.ones_like(y)], [])
    with mock.patch.object(LinearUse, "targets", None):
        reduce(module, [tape])
    plain(x).sum().backward()
    return all(torch.equal(p.grad, q.grad) for p, q in zip(module.parameters(), plain.parameters(), strict=True))


def test_w_that_does_not_say_whose_gradients_it_gives_is_reduced_at_its_end(tmp_path: Path) -> None:
    bodies = [partial(in_group, tmp_path / "store", 0, 1, whole_backward_with_unknown_targets)]
    assert persistent.ranks.results(bodies) == [True]
