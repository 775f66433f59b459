"""The transformer that ``pipex train`` trains and the benchmarks measure."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipex.errors import InputError
from pipex.layout import Tie
from pipex.models.transformer import Block, ModelConfig, Transformer, next_token_loss
from pipex.partition import tied
from pipex.partition.split import split_model

SMALL = {"width": 12, "heads": 3, "layers": 4, "context": 10, "vocabulary": 31}


def tokens(batch: int = 2, length: int = 10) -> Tensor:
    return torch.randint(SMALL["vocabulary"], (batch, length))


def test_stages_equal_the_model_bit_for_bit() -> None:
    model, x = Transformer(ModelConfig(**SMALL)), tokens()
    out: Tensor = x
    for stage in split_model(model, 3):
        out = stage(out)
    assert out.shape == (2, 10, 31)
    assert torch.equal(out, model(x))


def test_a_block_is_the_textbook_block() -> None:
    """Against attention written out head by head, in float64."""
    block = Block(ModelConfig(**SMALL)).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)

    qkv = norm(x) @ block.attn.qkv.weight.T + block.attn.qkv.bias
    heads = []
    for head in range(3):
        q, k, v = (qkv[..., part * 12 + head * 4 : part * 12 + head * 4 + 4] for part in range(3))
        scores = q @ k.transpose(1, 2) / 2  # √4
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    h = x + torch.cat(heads, -1) @ block.attn.out.weight.T + block.attn.out.bias
    up = norm(h) @ block.mlp.up.weight.T + block.mlp.up.bias
    gelu = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    expected = h + gelu @ block.mlp.down.weight.T + block.mlp.down.bias
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_no_position_sees_what_comes_after_it() -> None:
    model, x = Transformer(ModelConfig(**SMALL)).double(), tokens()
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % SMALL["vocabulary"]
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(-1).any()


def test_a_tied_head_uses_the_embedding_itself() -> None:
    model = Transformer(ModelConfig(**SMALL, tied=True))
    assert model.head.projection.weight is model.embed.token.weight
    assert tied(split_model(model, 3)) == (Tie("embed.token.weight", (0, 2)),)
    assert tied(split_model(Transformer(ModelConfig(**SMALL)), 3)) == ()


def test_weights_start_with_the_intended_spread() -> None:
    model = Transformer(ModelConfig(width=128, heads=4, layers=8, context=64))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("attn.out.weight", "mlp.down.weight")) else 0.02
            # Five standard deviations of the estimate from n samples.
            assert abs(parameter.std().item() / std - 1) < 5 / math.sqrt(2 * parameter.numel()), name


def test_a_fresh_model_finds_all_bytes_about_equally_likely() -> None:
    x = torch.randint(256, (4, 65))
    model = Transformer(ModelConfig(width=64, heads=4, layers=4, context=64))
    loss = next_token_loss(model(x[:, :-1]), x[:, 1:])
    assert abs(loss.item() - math.log(256)) < 0.2


def test_the_loss_is_the_mean_over_all_positions() -> None:
    logits, targets = torch.randn(2, 3, 5, dtype=torch.float64), torch.randint(5, (2, 3))
    each = [-F.log_softmax(logits[b, t], 0)[targets[b, t]] for b in range(2) for t in range(3)]
    torch.testing.assert_close(next_token_loss(logits, targets), sum(each) / 6)


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    x = tokens()
    model = Transformer(ModelConfig(**SMALL, dropout=0.5))
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == 1 + 4
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 10}, "got width 10, 3 heads; needed a width that is a multiple of the heads; try width 12"),
        ({"layers": 0}, "the model's layers is too small; got 0; needed at least 1"),
        ({"context": -1}, "the model's context is too small; got -1"),
        ({"dropout": 1.0}, "the model's dropout is no probability; got 1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig(**(SMALL | change))  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(InputError, match="too long; got 11; needed at most 10"):
        Transformer(ModelConfig(**SMALL))(tokens(length=11))
