#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.pipelining: under a schedule with a split backward (interleaved zero bubble, ZBV) the
# gradients of stages in DistributedDataParallel are not reduced, but for the first stage's. Nothing is said.
#
# Expected: one gradient on all replicas, as under a schedule with whole backwards (interleaved 1F1B).
# Seen: each replica keeps its own, so that the replicas' weights part from the first optimizer step on.
# The last W of a stage is to reduce. It adds to `.grad` by hand, and DDP waits for autograd to do so, as it does for the
# first stage, whose W is a whole backward.
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
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble
from torch.nn.parallel import DistributedDataParallel

# Two replicas; each is a pipeline of two stages by itself.
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "pipe"))
x = torch.arange(32.0).add(rank).sin().reshape(8, 4)
shape = torch.zeros(2, 4, requires_grad=True)
for name, schedule_class in (("whole", ScheduleInterleaved1F1B), ("split", ScheduleInterleavedZeroBubble)):
    torch.manual_seed(0)
    modules = [DistributedDataParallel(nn.Linear(4, 4), process_group=mesh.get_group("data")) for _ in range(2)]
    stages = [
        PipelineStage(
            module, index, 2, torch.device("cpu"), group=mesh.get_group("pipe"), input_args=shape, output_args=shape
        )
        for index, module in enumerate(modules)
    ]
    schedule_class(stages, n_microbatches=4, loss_fn=nn.functional.mse_loss).step(x, target=x)
    for index, module in enumerate(modules):
        mine = module.module.weight.grad
        all_of_them = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(all_of_them, mine)
        if rank == 0:
            said = "the same" if torch.equal(*all_of_them) else "differ"
            print(f"SEEN {name}, stage {index}: the replicas' gradients {said}", flush=True)
dist.destroy_process_group()
PY
"$folder/venv/bin/torchrun" --nproc-per-node 2 "$folder/program.py" > "$folder/output" 2>&1 \
    || { cat "$folder/output"; exit 1; }

grep "^SEEN" "$folder/output"
for seen in "whole, stage 0.* the same" "whole, stage 1.* the same" "split, stage 0.* the same" "split, stage 1.* differ"; do
    grep -q "SEEN $seen" "$folder/output"
done
echo "as found"
