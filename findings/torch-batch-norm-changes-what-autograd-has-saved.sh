#!/usr/bin/env bash
# torch 2.13.0 (2.15.0 too), CPU: batch_norm writes its running statistics without raising their version, so autograd
# does not notice when a graph has saved them before.
#
# Expected: "one of the variables needed for gradient computation has been modified by an inplace operation", as after
# any other change in place, instance_norm's of the same statistics among them.
# Seen: backward goes through and returns a wrong gradient: made with the statistics after the second forward instead of
# those that the graph was made with. It matters where a layer uses its own running_mean in a differentiable expression
# (batch renormalisation, a penalty on the drift) and runs again before the backward, as with several micro-batches under
# way.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5

cat > "$folder/program.py" <<'PY'
import torch
from torch import nn
from torch.nn import functional as F

x = torch.arange(24.0).reshape(4, 3, 2)
for normalise in (F.batch_norm, F.instance_norm):
    mean, variance = torch.ones(3), torch.ones(3)
    weight = nn.Parameter(torch.ones(3))
    penalty = (weight * mean).sum()  # d penalty / d weight = mean, now 1
    version = mean._version
    normalise(x, mean, variance, None, None, True, 0.5)
    raised = mean._version - version
    assert not torch.equal(mean, torch.ones(3)), "the statistics were to change"
    try:
        penalty.backward()
        said = f"gradient {weight.grad.tolist()}, needed {[1.0] * 3}"
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error), error
        said = "refused: modified by an inplace operation"
    print(f"SEEN {normalise.__name__}: version raised by {raised}; {said}")
PY

"$folder/venv/bin/python" "$folder/program.py" | tee "$folder/output"
grep -q "^SEEN batch_norm: version raised by 0; gradient \[.*\], needed \[1.0, 1.0, 1.0\]$" "$folder/output"
grep -q "^SEEN instance_norm: version raised by [1-9].*; refused: modified by an inplace operation$" "$folder/output"
if grep -q "gradient \[1.0, 1.0, 1.0\]" "$folder/output"; then exit 1; fi
echo "as found"
