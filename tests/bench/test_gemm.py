"""``pipex bench gemm``: what can be tested without a GPU, by references in the kernels' place and another clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipex.bench import gemm, gpu, products
from pipex.bench.driver import Rounds
from pipex.bench.gemm import measure
from pipex.bench.products import Case, cases
from pipex.cli import main

BF16, FP32 = "bfloat16", "float32"


class CpuClock:
    """The calls take 1, 2, … µs."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls = 0

    def sample(self, call: Callable[[], object]) -> float:
        call()
        self.calls += 1
        return float(self.calls)

    def host_us(self, call: Callable[[], object]) -> float:
        return 3.0


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """References stand where the kernels do; ``damage`` is added to all that they write."""
    pytest.importorskip("triton")
    from pipex.triton_kernels import input_gradient, weight_gradient

    state = SimpleNamespace(damage=0.0)

    def one(dy: Tensor, weight: Tensor, *, activation: str | None, z: Tensor | None, out: Tensor) -> None:
        exact = input_gradient.input_gradient_reference(
            dy.double(), weight.double(), activation=activation, z=None if z is None else z.double()
        )
        out.copy_(exact + state.damage)

    def two(dy: Tensor, weight: Tensor, gate: Tensor, up: Tensor, *, out: tuple[Tensor, Tensor]) -> None:
        exact = input_gradient.swiglu_input_gradient_reference(*(t.double() for t in (dy, weight, gate, up)))
        for result, wanted in zip(out, exact, strict=True):
            result.copy_(wanted + state.damage)

    def weights(dys: list[Tensor], xs: list[Tensor], *gradients: Tensor | None) -> None:
        present = [g for g in gradients if g is not None]
        exact = [g.double() for g in present]
        weight_gradient.weight_gradient_reference([d.double() for d in dys], [x.double() for x in xs], *exact)
        for result, wanted in zip(present, exact, strict=True):
            result.copy_(wanted + state.damage)

    monkeypatch.setattr(input_gradient, "input_gradient", one)
    monkeypatch.setattr(input_gradient, "swiglu_input_gradient", two)
    monkeypatch.setattr(weight_gradient, "weight_gradient", weights)
    return state


def rows(kind: str, micro_batches: int = 1, dtype: str = BF16) -> list[Any]:
    case = Case(kind, 12, 40, 24, micro_batches, dtype, FP32)
    return measure([case], Rounds(2, 1), CpuClock(), (100.0, 1000.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", products.KINDS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.usefixtures("references")
def test_both_providers_are_right(kind: str, dtype: str) -> None:
    found = rows(kind, dtype=dtype)
    assert [row.provider for row in found] == ["pipex", "cublas"]
    assert [row.correct for row in found] == [True, True]


@pytest.mark.usefixtures("references")
def test_several_micro_batches_are_also_measured_in_one_product() -> None:
    found = rows("dW+db", micro_batches=3)
    assert [(row.case, row.provider) for row in found] == [
        ("dW+db/40x24/12x3", provider) for provider in ("pipex", "cublas", "cublas-slab")
    ]
    assert all(row.correct for row in found)


@pytest.mark.parametrize("kind", ["dX", "dX+swiglu", "dW", "dW+db"])
@pytest.mark.parametrize("damage", [0.2, torch.nan])
def test_a_wrong_kernel_is_seen(kind: str, damage: float, references: SimpleNamespace) -> None:
    references.damage = damage
    assert [row.correct for row in rows(kind)] == [False, True]


def test_an_error_of_more_than_twice_torch_s_is_wrong(references: SimpleNamespace) -> None:
    references.damage = 1e-4  # far below bfloat16's rounding, far above float32's
    assert [row.correct for row in rows("dW")] == [False, True]
    references.damage = 1e-7
    assert [row.correct for row in rows("dW")] == [True, True]


def test_a_wrong_cublas_is_seen(references: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(dys: list[Tensor], xs: list[Tensor], *gradients: Tensor) -> None:
        if dys[0].dtype is not torch.float64:
            gradients[0].zero_()

    monkeypatch.setattr(gemm, "add_by_torch", lambda *a: (right(*a), wrong(*a)))
    assert [row.correct for row in rows("dW")] == [True, False]


right = gemm.add_by_torch


@pytest.mark.usefixtures("references")
def test_figures_follow_from_the_medians() -> None:
    pipex, cublas = rows("dW")
    # Calls 1 and 2 are the warm-up; then pipex takes 3 and 5, cublas 4 and 6.
    assert (pipex.time.p50, cublas.time.p50, pipex.ratio, cublas.ratio) == (4.0, 5.0, 1.25, 1.0)
    flop = 2 * 12 * 40 * 24
    nbytes = 12 * (40 + 24) * 2 + 2 * 40 * 24 * 4
    assert pipex.figures == pytest.approx(
        {
            "tflop_per_s": flop / 4e6,
            "gb_per_s": nbytes / 4e3,
            "flop_share": flop / 4e8,
            "copy_share": nbytes / 4e6,
            "host_us": 3.0,
        }
    )


@pytest.mark.parametrize(
    ("kind", "nbytes"),
    [
        ("dX", 2 * (5 * 7 + 7 * 3 + 5 * 3)),
        ("dX+gelu", 2 * (5 * 7 + 7 * 3 + 2 * 5 * 3)),
        ("dX+swiglu", 2 * (5 * 7 + 7 * 3 + 4 * 5 * 3)),
    ],
)
def test_bytes_are_those_of_each_operand_once(kind: str, nbytes: int) -> None:
    assert Case(kind, 5, 7, 3, 1, BF16, FP32).nbytes == nbytes


def test_cases_are_all_combinations_once() -> None:
    found = cases(["dX", "dX+gelu", "dW"], ["square", "up"], [8], [2, 4], [1, 3], "bfloat16", "float32")
    assert [case.name for case in found] == [
        "dX/8x8/2", "dX/8x8/4", "dX/32x8/2", "dX/32x8/4",
        "dX+gelu/8x32/2", "dX+gelu/8x32/4",
        "dW/8x8/2x1", "dW/8x8/2x3", "dW/8x8/4x1", "dW/8x8/4x3",
        "dW/32x8/2x1", "dW/32x8/2x3", "dW/32x8/4x1", "dW/32x8/4x3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "dY"], "an unknown choice; got 'dY'; needed one of dX,"),
        (["--layers", "round"], "an unknown choice; got 'round'; needed one of square, up, down"),
        (["--dtype", "int8"], "an unknown choice; got 'int8'"),
        (["--gradient", "float16"], "no such gradient; got float16"),
        (["--tokens", "0"], "a size is below 1"),
        (["--hidden", "8,x"], "not a list of numbers; got '8,x'"),
        (["--min-ratio", "dX=2"], "a floor for a case that is not measured"),
    ],
)
def test_bad_options_are_named_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "gemm", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_no_gpu_is_one_line_that_names_the_way_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gemm"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pipex bench: NativeUnavailable: pipex bench gemm measures on a GPU and there is none")
    assert "--compile-only" in line


@pytest.mark.parametrize("options", [[], ["--compile-only"]])
def test_no_triton_is_one_line_that_says_what_to_do(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "require_gpu", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(gemm.importlib.util, "find_spec", lambda _: None)
    assert main(["bench", "gemm", *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "NativeUnavailable: Triton" in line
    assert "pip install 'pipex-torch[triton]'" in line


@pytest.mark.parametrize("spills", [0, 2])
def test_compile_only_prints_each_variant_and_fails_on_a_spill(
    spills: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from pipex.triton_kernels import resources
    from pipex.triton_kernels.variants import variants

    counts = (200, 150_000, 227_000, 0, spills, 64, 0, 0, 4, 1, 0, 0, 0)
    monkeypatch.setattr(resources, "measure", lambda v, sm: resources.Resources("kernel", v.name, sm, "3.9.0", *counts))
    code = main(["bench", "gemm", "--compile-only", "--json"])
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert code == (1 if spills else 0)
    assert ("sm_90: spills" in output.err) == bool(spills)
    assert "triton" in report["environment"]
    assert len(report["rows"]) == sum(len(variant.capabilities) for variant in variants())
    assert report["rows"][0] == {
        "case": "input gradient, plain, sm_90", "provider": "pipex", "registers": 200, "shared": 150_000,
        "shared_limit": 227_000, "spills": spills, "stack": 0, "wgmma": 64, "mma": 0, "correct": not spills,
    }  # fmt: skip
