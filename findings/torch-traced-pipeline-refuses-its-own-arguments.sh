#!/usr/bin/env bash
# torch 2.13.0, CPU: a schedule cannot pass the arguments that a pipeline was traced with, if one is a constant.
#
# Expected: what pipeline() was given as an example, and what the traced pipeline takes when it is called, a schedule's
# step() takes too.
# Seen: with a flag among the keyword arguments, pipe(x=..., flag=False) runs, and schedule.step(x=..., flag=False) raises
# TypeError: forward() got an unexpected keyword argument 'flag'. Without the flag the schedule runs: the stage's own
# graph has no such input.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5

cat > "$folder/program.py" <<'PY'
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import ScheduleGPipe, pipeline

warnings.simplefilter("ignore")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, flag: bool = True) -> torch.Tensor:
        return self.linear(x) * 2 if flag else self.linear(x)


dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
model, x = Model(), torch.ones(4, 2)
pipe = pipeline(model, (), {"x": x[:2], "flag": False}, {})
print("SEEN called:", torch.equal(pipe(x=x[:2], flag=False)[0], model(x[:2], flag=False)))
schedule = ScheduleGPipe(pipe.build_stage(0, torch.device("cpu")), 2)
try:
    schedule.step(x=x, flag=False)
except Exception as error:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    print(f"SEEN in a schedule: {type(cause).__name__}: {cause}")
print("SEEN in a schedule, without the flag:", torch.equal(schedule.step(x=x), model(x, flag=False)))
PY

"$folder/venv/bin/python" "$folder/program.py" | tee "$folder/output"
grep -q "^SEEN called: True$" "$folder/output"
grep -q "^SEEN in a schedule: TypeError: .*got an unexpected keyword argument 'flag'$" "$folder/output"
grep -q "^SEEN in a schedule, without the flag: True$" "$folder/output"
echo "as found"
