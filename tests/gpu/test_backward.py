"""The split backward on a GPU: as near to float64 as autograd's, however W's products are made."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pipex
from pipex.backward import Splitter, choice
from pipex.models.transformer import Block, ModelConfig

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


def module(width: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(width, heads=width // 64, layers=2, context=128)
    return nn.Sequential(Block(config), Block(config)).to("cuda", dtype)


def batches(width: int, tokens: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [tuple(torch.randn(2, tokens, width, device="cuda").to(dtype) for _ in range(2)) for _ in range(3)]  # type: ignore[misc]


def whole(stage: nn.Module, data: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> nn.Module:
    stage = copy.deepcopy(stage).to(dtype)
    for x, dy in data:
        stage(x.to(dtype)).backward(dy.to(dtype))
    return stage


def split(stage: nn.Module, data: list[tuple[Tensor, Tensor]], splitter: Splitter) -> None:
    tapes = []
    for x, dy in data:
        inputs = [x.detach().requires_grad_()]
        with splitter.record() as tape:
            y = stage(*inputs)
        tape.backward_input([y], [dy], inputs)
        tapes.append(tape)
    for tape in tapes:
        tape.backward_weight(more=tape is not tapes[-1])


@pytest.mark.parametrize("main", [False, True], ids=["grad", "main_grad"])
@pytest.mark.parametrize("provider", [choice.TRITON, choice.TORCH])
@pytest.mark.parametrize(("width", "tokens"), [(256, 128), (192, 65)])
def test_fused_gradients(width: int, tokens: int, provider: str, main: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if provider == choice.TRITON:
        pytest.importorskip("triton")
    for user in ("products", "activated"):
        monkeypatch.setattr(f"pipex.backward.{user}.provider", lambda *_: provider)
    stage, data = module(width, BF16), batches(width, tokens, BF16)
    peer, exact = whole(stage, data, BF16), whole(stage, data, torch.float64)
    twin = copy.deepcopy(stage)
    for ours in (stage, twin):
        splitter = Splitter.of(ours)
        for parameter in ours.parameters() if main else ():
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        split(ours, data, splitter)
    names = "main_grad" if main else "grad"
    for (name, parameter), again, beside, wanted in zip(
        stage.named_parameters(), twin.parameters(), peer.parameters(), exact.parameters(), strict=True
    ):
        # autograd itself knows no main_grad: a norm's gradient goes to .grad
        found, same = (getattr(p, names) if "norm" not in name or not main else p.grad for p in (parameter, again))
        assert torch.equal(found, same), f"{name}: other bits when run again"
        error, its_error = ((g.double() - wanted.grad).abs().max() for g in (found, beside.grad))
        assert error <= 2 * its_error + 1e-6, f"{name}: {error} beside {its_error}"


def test_exact_gradients_have_autograds_bits() -> None:
    stage, data = module(256, BF16), batches(256, 128, BF16)
    reference = whole(stage, data, BF16)
    split(stage, data, Splitter(stage.parameters(), exact=True))
    for parameter, wanted in zip(stage.parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter.grad, wanted.grad)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_embeddings(dtype: torch.dtype) -> None:
    stage = nn.Embedding(50, 24, padding_idx=3).to("cuda", dtype)
    exact = copy.deepcopy(stage).double()
    peer = copy.deepcopy(stage)
    data = [(torch.randint(0, 50, (3, 40), device="cuda"), torch.randn(3, 40, 24, device="cuda").to(dtype))] * 3
    splitter = Splitter.of(stage)
    tapes = []
    for ids, dy in data:
        with splitter.record() as tape:
            y = stage(ids)
        tape.backward_input([y], [dy], [])
        tapes.append(tape)
        peer(ids).backward(dy)
        exact(ids).backward(dy.double())
    for tape in tapes:
        tape.backward_weight(more=tape is not tapes[-1])
    error, its_error = ((p.weight.grad.double() - exact.weight.grad).abs().max() for p in (stage, peer))
    assert error <= 2 * its_error + 1e-6


def test_the_drop_in_passes_its_own_trial() -> None:
    with pipex.drop_in():
        pass
