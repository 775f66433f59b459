"""Compiled stages: what could go wrong unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_stages import ROWS, WIDTH, Together, blocks, check, each, same, start, step, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch_group import in_group

from pipex.backward import Splitter
from pipex.bench.deferred import Products
from pipex.errors import UnsupportedModule

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # the compiler looks at it
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # inductor, when it is imported
]


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def data() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(ROWS, WIDTH, requires_grad=True)


def recorded(module: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    with Splitter.of(module).record() as tape:
        y = module(x)
    return tape, y


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_second_half_reads_must_not_change(backend: str) -> None:
    x = data()
    tape, y = recorded(start(blocks, whole, backend), x)
    dy = torch.ones_like(y)
    tape.backward_input([y], [dy], [x])
    dy.add_(1)
    with pytest.raises(RuntimeError, match="deferred half of a compiled backward reads was modified in place"):
        tape.backward_weight()


def test_an_input_must_not_change() -> None:
    """That of the compiled part, saved by it as it is."""
    x = data()
    tape, y = recorded(start(lambda: Together(nn.Linear(WIDTH, WIDTH)), whole, "aot_eager"), x)
    tape.backward_input([y], [torch.ones_like(y)], [x])
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="was modified in place"):
        tape.backward_weight()


def test_a_graph_of_gradients_is_refused() -> None:
    x = data()
    module = start(blocks, whole, "aot_eager")
    _, y = recorded(module, x)
    with pytest.raises(UnsupportedModule, match="create_graph"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_pass_that_nobody_answers_for_is_refused() -> None:
    x = data()
    _, y = recorded(start(blocks, whole, "aot_eager"), x)
    with pytest.raises(UnsupportedModule, match="not the backward of its stage"):
        y.sum().backward()


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        raise ValueError("of the user's")


def test_an_error_in_the_backward_leaves_nothing() -> None:
    module, wanted = start(blocks, whole, "aot_eager"), start(blocks, whole, "aot_eager")
    splitter, x = Splitter.of(module), data()
    with splitter.record() as tape:
        y = module(Failing.apply(x))  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="of the user's"):
        tape.backward_input([y], [torch.ones_like(y)], [x])
    del tape, y
    step(splitter, module, x)
    wanted(x).sum().backward()
    same([p.grad for p in module.parameters()], [p.grad for p in wanted.parameters()])


def test_nothing_is_kept_of_a_forward_that_nobody_goes_back_through() -> None:
    x = data()
    module = start(blocks, whole, "aot_eager")
    splitter = Splitter.of(module)
    step(splitter, module, x)
    living = {id(t) for t in tensors()}
    for _ in range(3):
        with splitter.record() as tape:
            y = module(x)
        del tape, y
    assert len([t for t in tensors() if id(t) not in living]) <= 1


def tensors() -> list[Tensor]:
    import gc

    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), Tensor)]


class Gated(nn.Module):
    """Both halves of its backward read what the linear layer has saved, the first one last before it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * y * self.gate


def test_saved_tensors_are_left_as_they_are_for_the_second_half() -> None:
    """inductor gives the memory of those that a backward owns ("donated") to others."""
    with torch._inductor.config.patch(fx_graph_cache=False):
        check(Gated, backend="inductor")


def test_backwards_that_are_compiled_themselves_are_refused() -> None:
    """They take a compiled graph's backward as it was before the cut."""
    x = data()
    tape, y = recorded(start(blocks, whole, "aot_eager"), x)
    with (
        torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(UnsupportedModule, match="compiled autograd"),
    ):
        tape.backward_input([y], [torch.ones_like(y)], [x])


STORE = """
import json, sys, torch
from pathlib import Path
sys.path[:0] = {path!r}
from torch._dynamo.utils import counters
from compiled_stages import blocks, whole, start, step, ROWS, WIDTH
from pipex.backward import Splitter
torch.manual_seed(0)
x = torch.randn(ROWS, WIDTH, requires_grad=True)
module = start(blocks, whole, "inductor")
if sys.argv[1] == "split":
    with Splitter.of(module).record() as tape:
        y = module(x)
    tape.backward_input([y], [torch.ones_like(y)], [x])
    early = sum(p.grad is not None for p in module.parameters())
    tape.backward_weight()
else:
    early = 0
    module(x).sum().backward()
print(json.dumps({{
    "early": early,
    "counts": {{k: counters["aot_autograd"]["autograd_cache_" + k] for k in ("hit", "miss", "saved")}},
    "gradients": [p.grad.tolist() for p in module.parameters()],
}}))
"""


@pytest.mark.long
def test_caches_of_others_are_neither_read_nor_written(tmp_path: Path) -> None:
    """A process with a split, and those before and after it without."""

    def run(how: str) -> Any:
        script = STORE.format(path=sys.path)
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        command = [sys.executable, "-c", script, how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    split_first = run("split")
    plain, split, plain_again = run("plain"), run("split"), run("plain")
    assert plain["counts"] == {"hit": 0, "miss": 1, "saved": 1}
    assert plain_again["counts"] == {"hit": 1, "miss": 0, "saved": 0}
    for found in (split_first, split):
        assert found["early"] == 0
        assert set(found["counts"].values()) == {0}
        assert found["gradients"] == plain["gradients"] == plain_again["gradients"]


def sharded(backend: str) -> nn.Module:
    module = start(blocks, each, backend)
    mesh = init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in module.children():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return fully_shard(module, mesh=mesh, mp_policy=policy)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_compiled_and_then_sharded(backend: str, tmp_path: Path) -> None:
    def run() -> None:
        x = data()
        reference = sharded(backend)
        for _ in range(2):
            reference(x).sum().backward()
        module = sharded(backend)
        splitter = Splitter.of(module)
        for _ in range(2):
            with splitter.record() as tape:
                y = module(x)
            with Products() as in_input:
                tape.backward_input([y], [torch.ones_like(y)], [x])
            with Products() as in_weight:
                tape.backward_weight()
            assert (in_input.count, in_weight.count) == (4, 4)
        gradients = [p.grad for p in module.parameters()]
        assert all(isinstance(gradient, DTensor) for gradient in gradients)
        same(gradients, [p.grad for p in reference.parameters()])

    in_group(tmp_path / "store", 0, 1, run)


class Around(nn.Module):
    """A function that is compiled, in a stage that is not."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), self.weight)


def test_a_compiled_function_within_a_stage() -> None:
    function = torch.compile(lambda x, w: torch.tanh(F.linear(x, w)), backend="aot_eager")
    check(lambda: Around(function), how=lambda module, _: module)


FUNCTIONS: dict[str, Callable[[Tensor, nn.Parameter], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: torch.matmul(x, w),
    "method": lambda x, w: x.matmul(w) + x.mm(w),
    "operator": lambda x, w: x @ w,
    "addmm": lambda x, w: torch.addmm(x, x, w),
    "bmm": lambda x, w: torch.bmm(x[None], w[None])[0],
    "einsum": lambda x, w: torch.einsum("ij,jk->ik", x, w),
    "convolution": lambda x, w: F.conv1d(x[None], w[:ROWS, :ROWS, None])[0],
    "embedding": lambda x, w: F.embedding((x[:, 0] * 3).long() % WIDTH, w),
    "bilinear": lambda x, w: F.bilinear(x, x, w[None]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_function_breaks_a_graph(name: str) -> None:
    """The compiler goes through what stands in the place of torch's."""
    function = torch.compile(lambda x, w: torch.tanh(FUNCTIONS[name](x, w)), backend="aot_eager", fullgraph=True)

    class Stage(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.function(x, self.weight)

    check(lambda: Stage(function), how=lambda module, _: module)


def test_what_waits_is_told() -> None:
    """What W gives gradients to and what it holds, no graph with it."""
    x = data()
    module = start(lambda: Together(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), whole, "aot_eager")
    tape, y = recorded(module, x)
    tape.backward_input([y], [torch.ones_like(y)], [x])
    assert tape.targets is not None
    assert {id(target) for target in tape.targets} == {id(parameter) for parameter in module.parameters()}
    assert any(held.data_ptr() == x.data_ptr() for held in tape.held)
    assert not any(held.requires_grad for held in tape.held)


def test_the_second_half_runs_as_it_would_in_a_backward() -> None:
    """Whatever stands around W."""
    x = data()
    module, wanted = start(blocks, whole, "aot_eager"), start(blocks, whole, "aot_eager")
    wanted(x).sum().backward()
    tape, y = recorded(module, x)
    tape.backward_input([y], [torch.ones_like(y)], [x])
    with torch.autocast("cpu", torch.bfloat16):
        tape.backward_weight()
    same([p.grad for p in module.parameters()], [p.grad for p in wanted.parameters()])
