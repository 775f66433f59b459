#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.pipelining: under a schedule with a split backward (interleaved zero bubble, ZBV), a
# stage whose layers FSDP2 shards one by one, as its documentation advises, gets no gradients for them. Nothing is said.
#
# Expected: the gradients of the whole backward (interleaved 1F1B), or an error.
# Seen: .grad is None for every parameter of every layer that is wrapped, in all stages but the first.
# The I of a stage asks autograd for the gradients of `stage.submod.parameters()`. By default fully_shard lets go of a
# layer's gathered parameters after its forward (all but the root's), so that at this moment the module has the shards,
# which are in no graph. With reshard_after_forward=False the gathered ones are found, and the gradients are right.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5

cat > "$folder/program.py" <<'PY'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

# Two ranks share every parameter; each is a pipeline of two stages by itself.
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "pipe"))


def gradients(schedule_class: type, **options: bool) -> list[torch.Tensor | None]:
    """Of the second stage."""
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)]
    for module in modules:
        for layer in (module[0], module[2]):
            fully_shard(layer, mesh=mesh["data"], **options)
        fully_shard(module, mesh=mesh["data"])
    stages = [PipelineStage(m, i, 2, torch.device("cpu"), group=mesh.get_group("pipe")) for i, m in enumerate(modules)]
    schedule = schedule_class(stages, n_microbatches=4, loss_fn=nn.functional.mse_loss)
    x = torch.arange(32.0).sin().reshape(8, 4)
    schedule.step(x, target=x)
    return [None if p.grad is None else p.grad.to_local() for p in modules[1].parameters()]


wanted = gradients(ScheduleInterleaved1F1B)
for name, options in (("by default", {}), ("with reshard_after_forward=False", {"reshard_after_forward": False})):
    found = gradients(ScheduleInterleavedZeroBubble, **options)
    lost = sum(gradient is None for gradient in found)
    right = sum(g is not None and torch.allclose(g, w) for g, w in zip(found, wanted, strict=True))
    if dist.get_rank() == 0:
        print(f"SEEN split {name}: {right} gradients right, {lost} lost", flush=True)
if dist.get_rank() == 0:
    print(f"SEEN whole: {sum(gradient is None for gradient in wanted)} lost", flush=True)
dist.destroy_process_group()
PY
"$folder/venv/bin/torchrun" --nproc-per-node 2 "$folder/program.py" > "$folder/output" 2>&1 \
    || { cat "$folder/output"; exit 1; }

grep "^SEEN" "$folder/output"
grep -q "SEEN whole: 0 lost" "$folder/output"
grep -q "SEEN split by default: 0 gradients right, 4 lost" "$folder/output"
grep -q "SEEN split with reshard_after_forward=False: 4 gradients right, 0 lost" "$folder/output"
echo "as found"
