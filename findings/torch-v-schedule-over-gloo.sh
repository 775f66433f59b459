#!/usr/bin/env bash
# torch 2.11.0, torch.distributed.pipelining: a V schedule (ZBV, DualPipeV) does not start over Gloo on two ranks.
#
# Expected: the schedule runs, as its interleaved relatives do on the same ranks.
# Seen: step() raises RuntimeError, "Pair is not connected". Before the first forward every stage exchanges one number
# with both of its neighbours, to make NCCL's communicators. In a V, two neighbouring stages are on one rank, so that
# rank sends to itself, which Gloo cannot do. torch 2.13.0 has no such exchange, and runs.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.3.5

cat > "$folder/program.py" <<'PY'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble

dist.init_process_group("gloo")
rank = dist.get_rank()
x = torch.randn(8, 4)
for schedule, mine in ((ScheduleInterleavedZeroBubble, [rank, 2 + rank]), (ScheduleZBVZeroBubble, [rank, 3 - rank])):
    stages = [PipelineStage(nn.Linear(4, 4), index, 4, torch.device("cpu")) for index in mine]
    step = schedule(stages, n_microbatches=4, loss_fn=nn.functional.mse_loss).step
    last = 3 in mine
    step(*((x,) if rank == 0 else ()), target=x if last else None)
    print(f"SEEN {schedule.__name__} runs on rank {rank}", flush=True)
PY
"$folder/venv/bin/torchrun" --nproc-per-node 2 "$folder/program.py" > "$folder/output" 2>&1 && status=0 || status=$?

echo "torchrun ended with $status; of its output:"
grep -E "^SEEN|Pair is not connected" "$folder/output" | sort -u || true
grep -q "SEEN ScheduleInterleavedZeroBubble runs on rank 1" "$folder/output"
if grep -q "SEEN ScheduleZBVZeroBubble" "$folder/output"; then exit 1; fi
grep -q "Pair is not connected" "$folder/output"
test "$status" -ne 0
echo "as found"
