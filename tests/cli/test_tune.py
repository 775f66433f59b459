"""``pipex tune`` as a person runs it, with references in the kernels' place and another clock; and ``pipex info``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tables import GPU, made_up_gpu
from torch import Tensor

from pipex.backward import products
from pipex.backward.products import add_by_torch, input_gradient_by_torch
from pipex.backward.tuning import Conditions, Product, Times
from pipex.backward.tuning_files import find, update
from pipex.bench import gemm, gpu
from pipex.bench.driver import Rounds
from pipex.bench.products import Case
from pipex.cli import main

__all__ = ["made_up_gpu"]

SMALL = ["--kinds", "dX,dW", "--layers", "square", "--hidden", "16", "--tokens", "8", "--micro-batches", "2",
         "-n", "2", "-w", "0"]  # fmt: skip
SQUARE = Product("dX", 8, 16, 16, 1, "bfloat16", "bfloat16")
WEIGHTS = Product("dW", 8, 16, 16, 2, "bfloat16", "float32")


class Clock:
    """Triton takes 10 µs, torch 20."""

    device = torch.device("cpu")
    host = 1.0

    def __init__(self, device: torch.device) -> None:
        pass

    def ceilings(self, dtype: torch.dtype, rounds: Rounds) -> tuple[float, float]:
        return 100.0, 1000.0

    def sample(self, call: Callable[[], object]) -> float:
        call()
        return 10.0 if call.__name__ == "_pipex" else 20.0

    def host_us(self, call: Callable[[], object]) -> float:
        return self.host if call.__name__ == "_pipex" else 1.0


@pytest.fixture
def machine(made_up_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with a GPU, where ``damage`` is added to what the kernels write."""
    pytest.importorskip("triton")
    from pipex.triton_kernels import input_gradient, weight_gradient

    state = SimpleNamespace(damage=0.0, cache=made_up_gpu)

    def one(dy: Tensor, weight: Tensor, *, activation: None, z: None, out: Tensor) -> None:
        input_gradient_by_torch(dy, weight, out=out).add_(state.damage)

    def weights(dys: list[Tensor], xs: list[Tensor], weight_grad: Tensor, bias_grad: None) -> None:
        add_by_torch(dys, xs, weight_grad, bias_grad)
        weight_grad += state.damage

    monkeypatch.setattr(input_gradient, "input_gradient", one)
    monkeypatch.setattr(weight_gradient, "weight_gradient", weights)
    monkeypatch.setattr(gpu, "require_gpu", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(gpu, "describe_gpu", lambda _: {"gpu": GPU.name, "driver_version": "580.1"})
    monkeypatch.setattr(gpu, "Clock", Clock)
    return state


def test_what_was_measured_is_kept_and_used(machine: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *SMALL, "--json"]) == 0
    said = capsys.readouterr()
    found = find(GPU)
    assert found.table is not None
    assert found.table.entries == {SQUARE: Times(10.0, 20.0), WEIGHTS: Times(10.0, 20.0)}
    assert found.table.driver == "580.1"
    report = json.loads(said.out)
    assert report["environment"]["table"] == f"{found.file}, 2 products"
    assert [
        (row["case"], row["provider"], row["p50_us"], row["wins_by"], row["correct"]) for row in report["rows"]
    ] == [
        ("dX/16x16/8", "pipex", 10.0, 2.0, True),
        ("dX/16x16/8", "cublas", 20.0, None, True),
        ("dW/16x16/8x2", "pipex", 10.0, 2.0, True),
        ("dW/16x16/8x2", "cublas", 20.0, None, True),
        ("dW/16x16/8x2", "cublas-slab", 20.0, None, True),
    ]
    assert "wins_by" in said.err
    asked = []
    for width in (16, 17):
        dys, xs = [torch.ones(8, width, dtype=torch.bfloat16)] * 2, [torch.ones(8, 16, dtype=torch.bfloat16)] * 2
        asked.append(products._weight_provider(dys, torch.zeros(width, 16), False))
    assert asked == ["triton", "torch"]
    assert products._input_provider(None, xs[0], torch.ones(16, 16, dtype=torch.bfloat16)) == "triton"


@pytest.mark.parametrize("damage", [0.5, torch.nan])
def test_a_wrong_result_of_triton_never_wins(
    damage: float, machine: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.damage = damage
    assert main(["tune", *SMALL]) == 1
    said = capsys.readouterr()
    assert "pipex tune: dX/16x16/8: pipex gave a wrong result\n" in said.err
    assert "WRONG" in said.out
    found = find(GPU).table
    assert found is not None
    assert found.entries == {SQUARE: Times(None, 20.0), WEIGHTS: Times(None, 20.0)}


def test_nothing_is_entered_where_torch_is_wrong(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*operands: Any) -> None:
        add_by_torch(*operands)
        if operands[2].dtype is not torch.float64:
            operands[2].zero_()

    monkeypatch.setattr(gemm, "add_by_torch", wrong)
    assert main(["tune", *SMALL]) == 1
    assert "dW/16x16/8x2: cublas gave a wrong result" in capsys.readouterr().err
    found = find(GPU).table
    assert found is not None
    assert set(found.entries) == {SQUARE}


def test_the_host_s_time_counts_where_it_is_the_longer(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Clock, "host", 50.0)
    assert main(["tune", *SMALL, "--json"]) == 0
    found = find(GPU).table
    assert found is not None
    assert found.entries[SQUARE] == Times(50.0, 20.0)
    assert [row["wins_by"] for row in json.loads(capsys.readouterr().out)["rows"]][:2] == [None, 2.5]


def test_a_second_run_adds_to_the_first(machine: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *SMALL]) == 0
    assert main(["tune", *SMALL, "--hidden", "24", "--kinds", "dX"]) == 0
    found = find(GPU).table
    assert found is not None
    assert set(found.entries) == {SQUARE, WEIGHTS, SQUARE._replace(n=24, k=24)}


def test_what_was_measured_before_an_interrupt_is_kept(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = gemm.measure

    def interrupted(chosen: list[Case], *rest: Any) -> Any:
        if chosen[0].kind == "dW":
            raise KeyboardInterrupt
        return measure(chosen, *rest)

    monkeypatch.setattr(gemm, "measure", interrupted)
    assert main(["tune", *SMALL]) == 130
    found = find(GPU).table
    assert found is not None
    assert set(found.entries) == {SQUARE}


def test_output_is_written_instead(machine: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    file = machine.cache / "shipped.json"
    for _ in range(2):  # the second time it is added to
        assert main(["tune", *SMALL, "--output", str(file)]) == 0
    assert find(GPU) == (None, None, None)
    assert len(json.loads(file.read_text())["entries"]) == 2


@pytest.mark.parametrize("content", ["weights", "other"])
def test_no_other_file_is_overwritten(
    content: str, machine: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    file = machine.cache / "model.pt"
    if content == "weights":
        file.write_bytes(b"weights")
    else:
        update(file, Conditions.here(GPU)._replace(gpu="another"), "1", {}, private=False)
    before = file.read_bytes()
    assert main(["tune", *SMALL, "--output", str(file)]) == 1
    assert f"--output {file} cannot be added to; got " in capsys.readouterr().err
    assert file.read_bytes() == before


def test_what_cannot_be_written_is_said_before_anything_is_measured(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gemm, "measure", lambda *_: pytest.fail("measured"))
    assert main(["tune", *SMALL, "--output", str(machine.cache / "none" / "t.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pipex tune: InputError: cannot write {machine.cache}/none/t.json; got No such file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "dY"], "an unknown choice; got 'dY'"),
        (["-n", "0"], "nothing would be measured; got -n 0 -w 5"),
        (["--hidden", "0"], "a size is below 1"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_no_gpu_and_no_triton_are_one_line_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pipex tune: NativeUnavailable: pipex tune measures on a GPU and there is none; got torch")

    monkeypatch.setattr(gpu, "require_gpu", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(gemm.importlib.util, "find_spec", lambda _: None)
    assert main(["tune"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pipex tune: NativeUnavailable: Triton, which compiles these kernels, is not installed")


def test_info_says_how_products_are_chosen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gemms"] == f"torch: torch {torch.__version__} finds no GPU"


def test_info_does_not_warn_of_a_table_that_it_explains(
    machine: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["tune", *SMALL]) == 0
    file = find(GPU).file
    assert file is not None
    file.write_text("{}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    capsys.readouterr()
    assert main(["info"]) == 0
    said = capsys.readouterr()
    assert f"ignored: {file} has another format; got None; needed pipex gemm table 1; run pipex tune" in said.out
    assert said.err == ""
