#!/usr/bin/env bash
# torch 2.15.0, torch.distributed.pipelining: a schedule that torch 2.14.1 wrote with its messages (format compute_comms,
# what _dump_csv writes unless told otherwise) is refused by _load_csv.
#
# Expected: the file loads, or the error says that it is of an older torch.
# Seen: ValueError, "cannot start REDUCE_GRAD for stage 0 while stage 2 has a pending reduction". 2.15 waits for sends and
# reductions by actions of their own, which older files lack; a file does not say which version it is of.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.3.5

# Interleaved 1F1B on two ranks, two stages each, two micro-batches, as torch 2.14.1's _dump_csv writes it.
cat > "$folder/of-2.14.1.csv" <<'CSV'
0UNSHARD,2UNSHARD,0F0,0SEND_F0,2RECV_F0,0F1,0SEND_F1,2RECV_F1,2F0,2SEND_F0,2F1,2SEND_F1,2RECV_B0,2B0,2SEND_B0,2RECV_B1,2B1,2SEND_B1,2REDUCE_GRAD,2RESHARD,0RECV_B0,0B0,0RECV_B1,0B1,0REDUCE_GRAD,0RESHARD
1UNSHARD,3UNSHARD,1RECV_F0,1F0,1SEND_F0,1RECV_F1,1F1,1SEND_F1,3RECV_F0,3F0,3RECV_F1,3B0,3SEND_B0,1RECV_B0,3F1,3B1,3SEND_B1,1RECV_B1,3REDUCE_GRAD,3RESHARD,1B0,1SEND_B0,1B1,1SEND_B1,1REDUCE_GRAD,1RESHARD
CSV

cat > "$folder/program.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, _PipelineScheduleRuntime

dist.init_process_group("gloo")
rank = dist.get_rank()


def load(path: str) -> str:
    stages = [PipelineStage(nn.Linear(2, 2), index, 4, torch.device("cpu")) for index in (rank, 2 + rank)]
    if path == "own":
        path = f"{sys.argv[2]}-{rank}.csv"
        ScheduleInterleaved1F1B(stages, 2, loss_fn=nn.functional.mse_loss)._dump_csv(path)
    try:
        _PipelineScheduleRuntime(stages, 2, loss_fn=nn.functional.mse_loss)._load_csv(path, format="compute_comms")
    except ValueError as error:
        return f"ValueError: {error}"
    return "loads"


print(f"SEEN rank {rank}, dumped by 2.15.0: {load('own')}\n", end="")
print(f"SEEN rank {rank}, dumped by 2.14.1: {load(sys.argv[1])}\n", end="")
dist.destroy_process_group()
PY
"$folder/venv/bin/torchrun" --nproc-per-node 2 "$folder/program.py" "$folder/of-2.14.1.csv" "$folder/own" \
    > "$folder/output" 2>&1 || { cat "$folder/output"; exit 1; }

grep "^SEEN" "$folder/output" | sort
for rank in 0 1; do
    grep -q "SEEN rank $rank, dumped by 2.15.0: loads" "$folder/output"
    grep -q "SEEN rank $rank, dumped by 2.14.1: ValueError: .* while stage 2 has a pending reduction" "$folder/output"
done
echo "as found"
