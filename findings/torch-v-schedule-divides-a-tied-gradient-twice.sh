#!/usr/bin/env bash
# torch 2.13.0 (2.14.1 and 2.15.0 too), torch.distributed.pipelining: a V schedule (ZBV, DualPipeV) puts the first stage
# and the last on one rank.
# If they share a parameter, as language models share the embedding with the head, its gradient is divided by the number
# of micro-batches twice.
#
# Expected: the gradient of one process, to rounding, as for all other parameters and as without sharing.
# Seen: relative error 0.75 with 4 micro-batches, that is hardly more than a quarter of the gradient; nothing is said.
# Each stage divides at its end what its parameters' gradients have gathered until then, the other stage's part too
# (scale_grads=True, the default). With scale_grads=False and one division by hand the gradient is right.
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
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

MICROBATCHES = 4


class Decoder(nn.Module):
    """Back to where the encoder came from, by its weight if that is given."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight


def model(tied: bool) -> list[nn.Module]:
    """An autoencoder in four stages."""
    torch.manual_seed(3)
    encoder = nn.Linear(6, 6, bias=False)
    weight = encoder.weight if tied else nn.Parameter(encoder.weight.detach().clone())
    middle = [nn.Sequential(nn.Linear(6, 6), nn.Sigmoid()) for _ in range(2)]
    return [stage.double() for stage in (encoder, *middle, Decoder(weight))]


dist.init_process_group("gloo")
rank = dist.get_rank()
x = torch.arange(96.0).sin().reshape(16, 6).double()
mse = nn.functional.mse_loss
for schedule_class in (ScheduleZBVZeroBubble, ScheduleDualPipeV):
    for tied, scale_grads in ((False, True), (True, True), (True, False)):
        whole, stages = model(tied), model(tied)
        mse(nn.Sequential(*whole)(x), x).backward()
        mine = [PipelineStage(stages[index], index, 4, torch.device("cpu")) for index in (rank, 3 - rank)]
        schedule = schedule_class(mine, n_microbatches=MICROBATCHES, loss_fn=mse, scale_grads=scale_grads)
        schedule.step(*((x,) if rank == 0 else ()), target=x if rank == 0 else None)
        if rank == 0:
            gradient, wanted = stages[0].weight.grad, whole[0].weight.grad
            if not scale_grads:
                gradient = gradient / MICROBATCHES
            error = ((gradient - wanted).norm() / wanted.norm()).item()
            by = "torch" if scale_grads else "hand"
            name = f"{schedule_class.__name__}, {'shared' if tied else 'separate'}, divided by {by}"
            print(f"SEEN {name}: relative error {error:.4f}", flush=True)
dist.destroy_process_group()
PY
"$folder/venv/bin/torchrun" --nproc-per-node 2 "$folder/program.py" > "$folder/output" 2>&1 \
    || { cat "$folder/output"; exit 1; }

grep "^SEEN" "$folder/output"
for schedule in ScheduleZBVZeroBubble ScheduleDualPipeV; do
    grep -q "SEEN $schedule, separate, divided by torch: relative error 0\.0000" "$folder/output"
    grep -q "SEEN $schedule, shared, divided by torch: relative error 0\.75" "$folder/output"
    grep -q "SEEN $schedule, shared, divided by hand: relative error 0\.0000" "$folder/output"
done
echo "as found"
