#!/usr/bin/env bash
# torch 2.13.0 (2.15.0 too), CPU: whether a weight requires grad decides by which product F.linear and torch.matmul
# multiply a 3-D input that is not contiguous by it, and so the bits of the result.
#
# Expected: requires_grad says what autograd records; the value of a forward does not depend on it.
# Seen: freezing a weight, with nothing else changed and no gradient computed anywhere, changes the output. One way folds
# the batch into the rows of one product, the other one makes a batched product, and these add up in another order. With
# a contiguous input the bits are the same. So a frozen teacher does not have the bits of the student that it was copied
# from, and a layer that is thawed in the middle of a run changes the loss before anything of it has been trained.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5

cat > "$folder/program.py" <<'PY'
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
SHAPES = [(3, 5, 5, 7), (6, 5, 129, 65), (2, 7, 33, 17), (1, 5, 100, 10), (4, 9, 48, 96)]


class Products(TorchDispatchMode):
    """Names the matrix products that are made."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "mm" in operation.__name__:
            made.append(operation.__name__.removesuffix(".default"))
        return operation(*args, **(kwargs or {}))


x, made = torch.randn(3, 6, 5)[:, 1:], []
with torch.no_grad(), Products():
    for trained in (False, True):
        F.linear(x, torch.randn(7, 5, requires_grad=trained))
print(f"SEEN products: frozen {made[0]}, trained {made[1]}")


def differ(contiguous: bool) -> int:
    """In how many shapes the frozen weight gives other bits."""
    generator = torch.Generator().manual_seed(0)
    found = 0
    for batch, rows, width, out in SHAPES:
        x = torch.randn(batch, rows + 1, width, generator=generator)[:, 1:]
        x = x.contiguous() if contiguous else x
        weight = torch.randn(out, width, generator=generator)
        frozen, trained = weight.clone(), weight.clone().requires_grad_()
        with torch.no_grad():
            one, other = (F.linear(x, w) for w in (frozen, trained))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        found += not torch.equal(one, other)
    return found


print(f"SEEN other bits: strided {differ(False) > 0}, contiguous {differ(True) > 0}")
PY

"$folder/venv/bin/python" "$folder/program.py" | tee "$folder/output"
grep -q "^SEEN products: frozen bmm, trained mm$" "$folder/output"
grep -q "^SEEN other bits: strided True, contiguous False$" "$folder/output"
echo "as found"
