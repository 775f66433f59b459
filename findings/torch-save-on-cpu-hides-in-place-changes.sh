#!/usr/bin/env bash
# torch 2.13.0, CPU: under saved-tensor hooks, torch.autograd.graph.save_on_cpu among them, autograd no longer notices that
# a tensor which it has saved was changed in place, and gives a wrong gradient.
#
# Expected: a backward that needs a tensor as it was raises "has been modified by an inplace operation", with hooks and
# without; or, since save_on_cpu says that it stores a copy, the gradient is that of the copy.
# Seen: without hooks it raises. Under save_on_cpu, on a model that is on the CPU already, nothing is copied and nothing is
# checked: the gradient of 2·exp(x) at x = 1 comes out as 4e, twice what it is. Hooks that hand on what they are given do
# the same on any device.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5

cat > "$folder/program.py" <<'PY'
import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks


def gradient(hooks: AbstractContextManager[object]) -> float | str:
    """Of 2·exp(x) at 1, where the exponential is doubled in place."""
    x = torch.ones((), requires_grad=True)
    with hooks:
        y = torch.exp(x)  # which saves y
    y.mul_(2)
    try:
        y.backward()
    except RuntimeError as error:
        return "raises" if "modified by an inplace operation" in str(error) else str(error)
    return x.grad.item()


found = {
    "no hooks": gradient(nullcontext()),
    "save_on_cpu": gradient(save_on_cpu()),
    "hooks that hand on": gradient(saved_tensors_hooks(lambda t: t, lambda t: t)),
}
for name, value in found.items():
    print(f"SEEN {name}: {value if isinstance(value, str) else round(value, 3)}")
print(f"right: {2 * math.e:.3f}")
PY

"$folder/venv/bin/python" "$folder/program.py" | tee "$folder/output"
grep -q "^SEEN no hooks: raises$" "$folder/output"
grep -q "^SEEN save_on_cpu: 10.873$" "$folder/output"
grep -q "^SEEN hooks that hand on: 10.873$" "$folder/output"
echo "as found"
