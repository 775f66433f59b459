"""Who multiplies: by the table, and by the guess."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import GPU, forget, made_up_gpu, write_table

from pipex.backward import choice, products, tuning
from pipex.backward.choice import PEAKS, explain, guess, provider
from pipex.backward.tuning import Gpu, Product, Times
from pipex.bench import products as measured

__all__ = ["made_up_gpu"]

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CUDA = torch.device("cuda", 0)
H100, H200, A100, B200 = (
    Gpu("NVIDIA H100 80GB HBM3", (9, 0)),
    Gpu("NVIDIA H200", (9, 0)),
    Gpu("NVIDIA A100-SXM4-80GB", (8, 0)),
    Gpu("NVIDIA B200", (10, 0)),
)


# ---------------------------------------------------------------------------------------------------------- the guess


@pytest.mark.parametrize(
    ("gpu", "kind", "shape", "micro_batches", "wanted"),
    [
        # The weight gradient of 4096 x 4096 is 67 MB, read and written in 40 µs by an H100 and 28 µs by an H200. One
        # product of 512 tokens is 29 µs of arithmetic on both: only several of them on the H100 can win.
        (H100, "dW", (512, 4096, 4096), 1, "torch"),
        (H100, "dW", (512, 4096, 4096), 4, "torch"),
        (H100, "dW", (512, 4096, 4096), 5, "triton"),
        (H100, "dW", (512, 4096, 4096), 8, "triton"),
        (H200, "dW", (512, 4096, 4096), 8, "torch"),
        # Of few tokens the traffic is nearly all.
        (H100, "dW", (64, 4096, 4096), 1, "torch"),
        (H100, "dW", (64, 4096, 4096), 2, "triton"),
        (H200, "dW", (64, 4096, 4096), 2, "triton"),
        # Of many it hides behind the arithmetic.
        (H100, "dW", (2048, 4096, 4096), 32, "torch"),
        (H100, "dW+db", (2048, 4096, 4096), 32, "torch"),
        # A small gradient stays in the L2 cache, and a small product is over before Triton has launched it.
        (H100, "dW", (64, 2048, 2048), 8, "torch"),
        (H100, "dW", (64, 2048, 2048), 32, "triton"),
        (H100, "dW", (16, 64, 64), 64, "torch"),
        # Plain input gradients have nothing that torch does twice.
        (H100, "dX", (8192, 4096, 16384), 1, "torch"),
        (H100, "dX+gelu", (8192, 1024, 4096), 1, "triton"),
        (H100, "dX+gelu", (8192, 4096, 16384), 1, "torch"),
        (H100, "dX+relu", (8192, 1024, 4096), 1, "triton"),
        (H100, "dX+swiglu", (8192, 4096, 16384), 1, "triton"),
        (H200, "dX+swiglu", (8192, 8192, 32768), 1, "torch"),
        (H200, "dX+swiglu", (512, 4096, 16384), 1, "torch"),
        # On other GPUs nothing is known.
        (A100, "dW", (64, 4096, 4096), 8, "torch"),
        (B200, "dW", (64, 4096, 4096), 8, "torch"),
        (GPU, "dW", (64, 4096, 4096), 8, "torch"),
        # Unaligned rows
        (H100, "dW", (64, 4095, 4096), 8, "torch"),
        (H100, "dW", (64, 4096, 4097), 8, "torch"),
    ],
)
def test_the_guess(gpu: Gpu, kind: str, shape: tuple[int, int, int], micro_batches: int, wanted: str) -> None:
    gradient = FP32 if kind.startswith("dW") else BF16
    assert guess(kind, shape, micro_batches, BF16, gradient, gpu) == wanted


def test_a_shorter_gradient_has_less_traffic_to_save() -> None:
    assert guess("dW", (512, 8192, 8192), 8, BF16, FP32, H100) == "triton"
    assert guess("dW", (512, 8192, 8192), 8, BF16, BF16, H100) == "torch"


gpus = st.sampled_from([Gpu(name, (9, 0)) for name in PEAKS])
tokens = st.integers(1, 1 << 15)
widths = st.integers(1, 1 << 12).map(lambda eighth: 8 * eighth)
gradients = st.sampled_from([BF16, FP32])


@given(gpus, st.sampled_from(["dW", "dW+db"]), tokens, widths, widths, st.integers(1, 64), gradients)
def test_more_micro_batches_never_turn_triton_into_torch(
    gpu: Gpu, kind: str, t: int, n: int, k: int, micro_batches: int, gradient: torch.dtype
) -> None:
    if guess(kind, (t, n, k), micro_batches, BF16, gradient, gpu) == "triton":
        for more in (micro_batches + 1, 2 * micro_batches, 10 * micro_batches):
            assert guess(kind, (t, n, k), more, BF16, gradient, gpu) == "triton"


@given(gpus, tokens, widths, widths, gradients)
def test_one_micro_batch_without_bias_is_always_torch_s(
    gpu: Gpu, t: int, n: int, k: int, gradient: torch.dtype
) -> None:
    assert guess("dW", (t, n, k), 1, BF16, gradient, gpu) == "torch"
    assert guess("dX", (t, n, k), 1, BF16, BF16, gpu) == "torch"


@given(gpus, st.sampled_from(tuning.KINDS), tokens, widths, widths, st.integers(1, 64))
def test_float32_operands_are_always_torch_s(gpu: Gpu, kind: str, t: int, n: int, k: int, micro_batches: int) -> None:
    assert guess(kind, (t, n, k), micro_batches, FP32, FP32, gpu) == "torch"
    assert guess(kind, (t, n, k), micro_batches, FP64, FP64, gpu) == "torch"


@given(gpus, tokens, widths, widths, st.integers(1, 64))
def test_a_bias_never_speaks_against_triton(gpu: Gpu, t: int, n: int, k: int, micro_batches: int) -> None:
    if guess("dW", (t, n, k), micro_batches, BF16, FP32, gpu) == "triton":
        assert guess("dW+db", (t, n, k), micro_batches, BF16, FP32, gpu) == "triton"


# ---------------------------------------------------------------------------------------------------------- the table


def test_a_cpu_is_torch_s_and_no_table_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setattr(choice, "find", lambda _: pytest.fail("a table was looked for"))
    assert provider("dW", (64, 4096, 4096), 8, BF16, FP32, torch.device("cpu")) == "torch"


def test_without_triton_no_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: H200.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: H200.capability)
    found = []
    for spec in ("a spec", None):
        monkeypatch.setattr(choice.importlib.util, "find_spec", lambda _, spec=spec: spec)
        choice.gpu_of.cache_clear()
        found.append(choice.gpu_of(CUDA))
    choice.gpu_of.cache_clear()
    assert found == [H200, None]
    assert choice.gpu_of(torch.device("cpu")) is None


def ask(kind: str = "dW", micro_batches: int = 8, t: int = 64) -> str:
    gradient = FP32 if kind.startswith("dW") else BF16
    return provider(kind, (t, 4096, 1024), micro_batches, BF16, gradient, CUDA)


@pytest.mark.usefixtures("made_up_gpu")
def test_the_faster_of_the_table_multiplies() -> None:
    write_table(
        {
            Product("dW", 64, 4096, 1024, 8, "bfloat16", "float32"): Times(10.0, 10.5),
            Product("dW", 512, 4096, 1024, 8, "bfloat16", "float32"): Times(10.0, 9.5),
            Product("dW", 4096, 4096, 1024, 8, "bfloat16", "float32"): Times(None, 10.0),  # Triton was wrong
            Product("dX", 64, 4096, 1024, 1, "bfloat16", "bfloat16"): Times(10.0, 10.5),
        }
    )
    assert [ask(t=t) for t in (64, 512, 4096)] == ["triton", "torch", "torch"]
    assert [ask(kind, 1) for kind in ("dX", "dX+gelu")] == ["triton", "torch"]


def test_a_table_stands_above_the_guess(made_up_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guessed = []
    monkeypatch.setattr(choice, "guess", lambda *arguments: guessed.append(arguments) or "torch")
    write_table({Product("dW", 64, 4096, 1024, 8, "bfloat16", "float32"): Times(1.0, 2.0)})
    assert ask() == "triton"
    assert not guessed
    assert ask(t=1024) == "torch"  # nothing near it was measured
    assert guessed == [("dW", (1024, 4096, 1024), 8, BF16, FP32, GPU)]


@pytest.mark.usefixtures("made_up_gpu")
def test_a_bias_makes_another_product() -> None:
    write_table({Product("dW+db", 8, 16, 16, 2, "bfloat16", "float32"): Times(1.0, 2.0)})
    dys = [torch.ones(8, 16, dtype=BF16)] * 2
    found = [products._weight_provider(dys, torch.ones(16, 16), bias) for bias in (True, False)]
    assert found == ["triton", "torch"]


def test_a_table_is_read_once(made_up_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(choice, "find", lambda gpu: found.append(gpu) or tuning_files_find(gpu))
    for t in range(1, 100):
        ask(t=t)
    assert found == [GPU]


tuning_files_find = choice.find


def test_an_ignored_table_is_one_warning_that_says_what_to_do(made_up_gpu: Path) -> None:
    file = write_table({Product("dW", 64, 4096, 1024, 8, "bfloat16", "float32"): Times(1.0, 2.0)})
    file.write_text(file.read_text().replace(torch.__version__, "1.0"))
    with pytest.warns(RuntimeWarning) as caught:
        assert [ask(t=t) for t in (64, 65, 66)] == ["torch"] * 3
    (warning,) = caught
    assert str(warning.message) == (
        f"a table of measured products is ignored: {file} was measured with another torch; got '1.0'; "
        f"needed {torch.__version__}; run pipex tune"
    )


def test_without_a_table_nothing_is_said(made_up_gpu: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask() == "torch"


def test_kinds_are_the_benchmark_s() -> None:
    assert set(tuning.KINDS) == set(measured.KINDS) == {*products._INPUT_KINDS.values(), "dW", "dW+db"}
    assert {kind: activation for activation, kind in products._INPUT_KINDS.items()} == measured.ACTIVATIONS


# ------------------------------------------------------------------------------------------------------- for people


def test_no_gpu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert explain() == f"torch: torch {torch.__version__} finds no GPU"


@pytest.fixture
def current_gpu(made_up_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return made_up_gpu


@pytest.mark.usefixtures("current_gpu")
def test_no_triton_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "gpu_of", lambda _: None)
    assert explain() == "torch: Triton is not installed (pip install 'pipex-torch[triton]')"


@pytest.mark.usefixtures("current_gpu")
def test_a_triton_that_cannot_run_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    write_table({Product("dX", 64, 4096, 1024, 1, "bfloat16", "bfloat16"): Times(1.0, 2.0)})
    assert ask("dX", 1) == "triton"
    monkeypatch.setattr(choice, "problem", lambda _: "RuntimeError: Failed to find C compiler")
    forget()
    assert ask("dX", 1) == "torch"
    assert explain() == "torch: Triton is installed and cannot be used: RuntimeError: Failed to find C compiler"


def test_a_triton_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipex.triton_kernels.trial", None)
    choice.problem.cache_clear()
    with pytest.warns(RuntimeWarning, match="torch makes all products: ModuleNotFoundError"):
        assert choice.problem(torch.device("cpu")) is not None
    choice.problem.cache_clear()


def test_a_trial_that_fails_is_said_once() -> None:
    pytest.importorskip("triton")
    choice.problem.cache_clear()
    with pytest.warns(RuntimeWarning, match="Triton cannot be used, so torch makes all products: ") as said:
        reasons = [choice.problem(torch.device("cpu")) for _ in range(2)]  # where Triton has no driver
    choice.problem.cache_clear()
    assert len(said) == 1
    assert reasons[0]
    assert reasons[0] == reasons[1]


@pytest.mark.usefixtures("current_gpu")
def test_a_guess_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain() == "torch: nothing is known of Made-up GPU/2; run pipex tune to measure"
    monkeypatch.setattr(choice, "gpu_of", lambda _: H200)
    assert explain() == "Triton or torch, guessed; run pipex tune to measure"


@pytest.mark.usefixtures("current_gpu")
def test_a_table_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_table({Product("dX", 64, 8, 8, 1, "bfloat16", "bfloat16"): Times(1.0, 2.0)})
    date = tuning.now()[:10]
    assert explain() == f"Triton or torch by 1 products measured {date} ({file}), others guessed"
    file.write_text("[]")
    assert explain() == (
        f"torch: nothing is known of Made-up GPU/2; ignored: {file} is no table; got 'list'; needed one object; "
        "run pipex tune"
    )
