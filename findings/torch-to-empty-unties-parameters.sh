#!/usr/bin/env bash
# torch 2.13.0, CPU: Module.to_empty makes two parameters of one that two layers hold.
#
# Expected: a model that is made on the meta device and then given memory is the model that was made: an output head tied
# to its embedding stays tied, as it does when the same model is moved to another dtype.
# Seen: each layer that holds the parameter gets one of its own. Nothing says so; load_state_dict fills both with the same
# values, so the first loss is right, and from the first update on the model is another one: it has more parameters, each
# with a part of the gradient. A module that stands twice in the model stays one.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5

cat > "$folder/program.py" <<'PY'
import torch
from torch import nn
from torch.nn import functional as F


def model() -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7, bias=False))
    found[2].weight = found[0].weight
    return found


def train(one: nn.Sequential) -> list[float]:
    optimizer, losses = torch.optim.SGD(one.parameters(), lr=1.0), []
    tokens = torch.arange(7)
    for _ in range(3):
        loss = F.cross_entropy(one(tokens), tokens.roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


with torch.device("meta"):
    blank = model()
print(f"SEEN on the meta device: {len(list(blank.parameters()))} parameter")
filled = blank.to_empty(device="cpu")
filled.load_state_dict(model().state_dict())
print(f"SEEN after to_empty: {len(list(filled.parameters()))} parameters")
print(f"SEEN after to(float64): {len(list(model().to(torch.float64).parameters()))} parameter")
norm = nn.BatchNorm1d(3, device="meta")
twice = nn.Sequential(norm, norm).to_empty(device="cpu")
print(f"SEEN a module that stands twice stays one: {twice[0] is twice[1]}")

tied, untied = train(model()), train(filled)
print("losses", tied, untied)
print(f"SEEN losses alike: {[abs(one - other) < 1e-4 for one, other in zip(tied, untied)]}")
PY

"$folder/venv/bin/python" "$folder/program.py" | tee "$folder/output"
grep -q "^SEEN on the meta device: 1 parameter$" "$folder/output"
grep -q "^SEEN after to_empty: 2 parameters$" "$folder/output"
grep -q "^SEEN after to(float64): 1 parameter$" "$folder/output"
grep -q "^SEEN a module that stands twice stays one: True$" "$folder/output"
grep -q "^SEEN losses alike: \[True, False, False\]$" "$folder/output"
echo "as found"
