#!/usr/bin/env bash
# torch 2.13.0 (2.14.1 and 2.15.0 too), torch.distributed.pipelining: ScheduleZBVZeroBubble(..., defer_pp_recv=True)
# trains on wrong gradients over Gloo, without a word.
#
# Expected: the gradients of the same schedule without the option, to rounding.
# Seen: relative errors of most of a gradient's size on both ranks. The option moves each receive next to the action that
# uses it, so a rank may receive a gradient before an activation that its peer has sent first. Messages between two ranks
# carry no name of their own, and here have one shape: each is taken for the other.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5

cat > "$folder/program.py" <<'PY'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

dist.init_process_group("gloo")
rank = dist.get_rank()
mine = [rank, 3 - rank]


def model() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double() for _ in range(4)]


x, y = torch.linspace(-1, 1, 32).reshape(8, 4).double(), torch.ones(8, 4).double()
whole = model()
nn.functional.mse_loss(nn.Sequential(*whole)(x), y).backward()
for deferred in (False, True):
    modules = model()
    stages = [PipelineStage(modules[index], index, 4, torch.device("cpu")) for index in mine]
    schedule = ScheduleZBVZeroBubble(
        stages, n_microbatches=4, loss_fn=nn.functional.mse_loss, defer_pp_recv=deferred
    )
    schedule.step(*((x,) if rank == 0 else ()), target=y if rank == 0 else None)
    error = max(
        ((p.grad - q.grad).norm() / q.grad.norm()).item()
        for index in mine
        for p, q in zip(modules[index].parameters(), whole[index].parameters())
    )
    print(f"SEEN rank {rank}, defer_pp_recv={deferred}: {'right' if error < 1e-12 else 'wrong'}, error {error:.1e}\n", end="")
dist.destroy_process_group()
PY
"$folder/venv/bin/torchrun" --nproc-per-node 2 "$folder/program.py" > "$folder/output" 2>&1 \
    || { cat "$folder/output"; exit 1; }

grep "^SEEN" "$folder/output" | sort
for rank in 0 1; do
    grep -q "SEEN rank $rank, defer_pp_recv=False: right" "$folder/output"
    grep -q "SEEN rank $rank, defer_pp_recv=True: wrong" "$folder/output"
done
echo "as found"
