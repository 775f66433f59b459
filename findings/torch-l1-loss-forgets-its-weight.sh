#!/usr/bin/env bash
# torch 2.13.0, CPU: F.l1_loss forgets its weight inside a TorchFunctionMode.
#
# Expected: a loss is the same inside of a mode that changes nothing, such as the one that `with torch.device(...)` enters.
# Seen: F.l1_loss(input, target, weight=weight) is then the loss without a weight, and nothing says so. It hands its
# arguments on to the mode, all but weight; F.mse_loss and F.huber_loss, which have the same argument, hand it on too.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5

cat > "$folder/program.py" <<'PY'
import torch
from torch.nn import functional as F

input, target, weight = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
for loss in (F.l1_loss, F.mse_loss, F.huber_loss):
    alone = loss(input, target, weight=weight).item()
    with torch.device("cpu"):
        inside = loss(input, target, weight=weight).item()
    print(f"SEEN {loss.__name__}: {alone:g}, and {inside:g} inside of a mode")
PY

"$folder/venv/bin/python" "$folder/program.py" | tee "$folder/output"
grep -q "^SEEN l1_loss: 1, and 1.5 inside of a mode$" "$folder/output"
grep -q "^SEEN mse_loss: 1, and 1 inside of a mode$" "$folder/output"
grep -q "^SEEN huber_loss: 0.75, and 0.75 inside of a mode$" "$folder/output"
echo "as found"
