#!/usr/bin/env bash
# torch 2.13.0, CPU: in a thread that was started after torch.set_num_threads(1), the backward of a convolution gives other
# bits than in the main thread, until that thread has done something else of torch's that asks for the number.
#
# Expected: set_num_threads is for the process: a thread that begins later keeps to it, and the same operation on the same
# values with one thread has the same bits everywhere.
# Seen: the weight's gradient is another one, as on more threads. A call of torch.get_num_threads() in the new thread,
# which changes nothing, is the cure. Why, as far as we know: torch gives a thread the number when it is first asked for
# it there, and oneDNN's operations do not ask. On one core there is nothing to see.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5

cat > "$folder/program.py" <<'PY'
import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor

assert len(os.sched_getaffinity(0)) > 1, "on one core there is nothing to see"
torch.set_num_threads(1)
torch.manual_seed(0)
convolution = torch.nn.Conv2d(3, 3, 3, padding=1)
x = torch.randn(9, 3, 2, 6).to(memory_format=torch.channels_last)
dy = torch.randn(9, 3, 2, 6)


def gradient() -> Tensor:
    convolution.weight.grad = None
    convolution(x).backward(dy)
    return convolution.weight.grad


def in_new_thread(before: Callable[[], object]) -> Tensor:
    found = []

    def run() -> None:
        before()
        found.append(gradient())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


expected = gradient()
for name, before in (("at once", lambda: None), ("after get_num_threads()", torch.get_num_threads)):
    same = torch.equal(in_new_thread(before), expected)
    print(f"SEEN in a new thread {name}: {'the same bits' if same else 'other bits'}")
PY

"$folder/venv/bin/python" "$folder/program.py" | tee "$folder/output"
grep -q "^SEEN in a new thread at once: other bits$" "$folder/output"
grep -q "^SEEN in a new thread after get_num_threads(): the same bits$" "$folder/output"
echo "as found"
