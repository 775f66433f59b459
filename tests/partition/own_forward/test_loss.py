"""The model's own loss as a sum and a count, beside the loss of the model on the whole batch, and torch's functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipex.errors import InputError, UnsupportedModule
from pipex.partition.own_forward.loss import Means, OwnLoss

ROWS, SEQUENCE, VOCABULARY, CLASSES = 5, 9, 40, 4
PARTS = ([0], [1, 2, 3], [4])  # rows of the micro-batches
LEARNED = (9, 4, 0, 1, 6)  # tokens of each row that are to be learned


def seen(forward: Callable[[], Any]) -> tuple[Any, OwnLoss]:
    with Means() as means:
        output = forward()
    return output, means.of(output)


# What torch's functions return.


def scores(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def classes() -> Tensor:
    return torch.tensor([0, 1, -100, 3, 2, -100])


def single(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> tuple[Callable[..., Tensor], Any, Any]:
    return function, args, kwargs


CALLS: dict[str, Callable[[], tuple[Callable[..., Tensor], Any, Any]]] = {
    "cross entropy": lambda: single(F.cross_entropy, scores(6, CLASSES), classes()),
    "another index ignored": lambda: single(F.cross_entropy, scores(6, CLASSES), classes().clamp(0), ignore_index=0),
    "class weights": lambda: single(F.cross_entropy, scores(6, CLASSES), classes(), weight=torch.rand(CLASSES)),
    "label smoothing": lambda: single(F.cross_entropy, scores(6, CLASSES), classes(), label_smoothing=0.2),
    "label smoothing and class weights": lambda: single(
        F.cross_entropy, scores(6, CLASSES), classes(), weight=torch.rand(CLASSES), label_smoothing=0.2
    ),
    "probabilities": lambda: single(F.cross_entropy, scores(6, CLASSES), torch.rand(6, CLASSES)),
    "probabilities and class weights": lambda: single(
        F.cross_entropy, scores(6, CLASSES), torch.rand(6, CLASSES), weight=torch.rand(CLASSES)
    ),
    "probabilities of pixels": lambda: single(F.cross_entropy, scores(2, CLASSES, 3), torch.rand(2, CLASSES, 3)),
    "pixels": lambda: single(F.cross_entropy, scores(2, CLASSES, 3), classes().view(2, 3)),
    "one sample": lambda: single(F.cross_entropy, scores(CLASSES), torch.tensor(2)),
    "one sample of probabilities": lambda: single(F.cross_entropy, scores(CLASSES), torch.rand(CLASSES)),
    "log-likelihood": lambda: single(F.nll_loss, scores(6, CLASSES), classes(), weight=torch.rand(CLASSES)),
    "squares": lambda: single(F.mse_loss, scores(6, 3), torch.randn(6, 3)),
    "weighted squares": lambda: single(F.mse_loss, scores(6, 3), torch.randn(6, 3), weight=torch.rand(6, 3)),
    "absolute": lambda: single(F.l1_loss, scores(6, 3), torch.randn(6, 3)),
    "weighted absolute": lambda: single(F.l1_loss, scores(6, 3), torch.randn(6, 3), weight=torch.rand(6, 3)),
    "weighted Huber": lambda: single(F.huber_loss, scores(6, 3), torch.randn(6, 3), weight=torch.rand(6, 3)),
    "smooth": lambda: single(F.smooth_l1_loss, scores(6, 3), torch.randn(6, 3)),
    "binary": lambda: single(
        F.binary_cross_entropy_with_logits, scores(6, 3), torch.rand(6, 3), weight=torch.rand(3),
        pos_weight=torch.rand(3),
    ),
    "binary of probabilities": lambda: single(F.binary_cross_entropy, scores(6, 3).sigmoid(), torch.rand(6, 3)),
    "divergence by rows": lambda: single(
        F.kl_div, scores(6, 3).log_softmax(1), torch.rand(6, 3).softmax(1), reduction="batchmean"
    ),
    "sequences": lambda: single(
        F.ctc_loss, scores(8, 3, CLASSES).log_softmax(2), torch.tensor([[1, 2], [3, 0], [0, 0]]), (8, 8, 8), (2, 1, 0)
    ),
    "sequences, lengths in a tensor": lambda: single(
        F.ctc_loss, scores(8, 2, CLASSES).log_softmax(2), torch.tensor([[1, 2], [3, 0]]), torch.tensor([8, 8]),
        torch.tensor([2, 1]), reduction="mean"
    ),
    "triplets": lambda: single(F.triplet_margin_loss, scores(6, 3), scores(6, 3), scores(6, 3)),
    "several labels": lambda: single(F.multilabel_soft_margin_loss, scores(6, 3), torch.ones(6, 3)),
    "Poisson": lambda: single(F.poisson_nll_loss, scores(6, 3), torch.rand(6, 3)),
    "Gauss": lambda: single(F.gaussian_nll_loss, scores(6, 3), torch.rand(6, 3), torch.rand(6, 3) + 1),
}  # fmt: skip
if hasattr(F, "linear_cross_entropy"):
    CALLS["linear cross entropy"] = lambda: single(
        F.linear_cross_entropy, scores(6, 3), torch.randn(CLASSES, 3), classes()
    )


@pytest.mark.parametrize("block", [nullcontext, torch.no_grad], ids=["gradients", "none"])
@pytest.mark.parametrize("name", CALLS)
def test_a_mean_of_torch_is_the_quotient_that_is_kept(
    name: str, block: Callable[[], AbstractContextManager[object]]
) -> None:
    function, args, kwargs = CALLS[name]()
    with block():
        expected = function(*args, **kwargs)
        given, found = seen(lambda: function(*args, **kwargs))
    assert given.dtype == expected.dtype
    torch.testing.assert_close(given, expected, rtol=3e-7, atol=0)
    torch.testing.assert_close(found.sum / found.count, expected, rtol=3e-7, atol=0)
    assert found.others == ()
    if expected.requires_grad:
        inputs = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        ours, theirs = torch.autograd.grad(found.sum, inputs), torch.autograd.grad(expected, inputs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one / found.count, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("module", [nn.CrossEntropyLoss(), nn.NLLLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_the_modules_are_seen_too(module: nn.Module) -> None:
    input = scores(6, CLASSES)
    target = classes() if isinstance(module, (nn.CrossEntropyLoss, nn.NLLLoss)) else torch.rand(6, CLASSES)
    assert torch.equal(seen(lambda: module(input, target))[0], module(input, target))


def test_the_sum_and_its_gradient_have_the_bits_of_torch() -> None:
    input, target = scores(200, VOCABULARY), torch.randint(0, VOCABULARY, (200,))
    target[::3] = -100
    mean, found = seen(lambda: F.cross_entropy(input, target))
    expected = F.cross_entropy(input, target, reduction="sum")
    assert torch.equal(found.sum, expected)
    assert torch.equal(*(torch.autograd.grad(each, input, retain_graph=True)[0] for each in (found.sum, expected)))
    assert int(found.count) == int((target != -100).sum())
    whole = F.cross_entropy(input, target)
    assert torch.equal(mean, whole)
    assert torch.equal(*(torch.autograd.grad(each, input)[0] for each in (mean, whole)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_short_numbers_are_long(dtype: torch.dtype) -> None:
    """A sum in float16 would end at 65504, one in bfloat16 grow in steps of 128."""
    input, target = scores(30_000, CLASSES, dtype=dtype), torch.randint(0, CLASSES, (30_000,))
    mean, found = seen(lambda: F.cross_entropy(input, target))
    exact = F.cross_entropy(input.detach().double(), target, reduction="sum")
    assert mean.dtype is dtype
    assert mean == F.cross_entropy(input, target)
    assert found.sum.dtype is torch.float32
    assert abs(found.sum.item() / exact.item() - 1) < 1e-4
    _, twice = seen(lambda: F.cross_entropy(input, target) * 2)
    assert twice.sum.dtype is torch.float32


def test_under_autocast_the_loss_is_what_autocast_makes_it() -> None:
    input, target = scores(30, CLASSES, dtype=torch.bfloat16), torch.randint(0, CLASSES, (30,))
    with torch.autocast("cpu", torch.bfloat16):
        mean, found = seen(lambda: F.cross_entropy(input, target))
        expected = [F.cross_entropy(input, target, reduction=reduction) for reduction in ("mean", "sum")]
    assert mean.dtype is torch.float32
    assert torch.equal(mean, expected[0])
    assert torch.equal(found.sum, expected[1])


# What models make of them.


def none_learned(input: Tensor) -> Tensor:
    return F.cross_entropy(input, torch.full((6,), -100))


@pytest.mark.parametrize("more", [lambda loss: loss, lambda loss: loss + 0.5, lambda loss: (loss + loss) / 2])
def test_nothing_to_learn_is_a_sum_of_0_with_gradients_of_0(more: Callable[[Tensor], Tensor]) -> None:
    input = scores(6, CLASSES)
    _, found = seen(lambda: more(none_learned(input)))
    assert found.count == 0
    assert found.sum == 0
    assert not torch.autograd.grad(found.sum, input)[0].any()


def added_in_place(input: Tensor) -> Tensor:
    loss = F.cross_entropy(input, classes())
    loss += 0.1 * input.square().mean()
    return loss


def test_what_is_added_in_place_is_not_lost() -> None:
    input = scores(6, CLASSES)
    expected = added_in_place(input)
    _, found = seen(lambda: added_in_place(input))
    assert found.count == 4
    torch.testing.assert_close(found.sum, expected * 4)


@pytest.mark.parametrize("block", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_loss_is_the_same_in_every_mode(block: Callable[[], AbstractContextManager[object]]) -> None:
    input = scores(6, CLASSES)
    with block():
        for forward in (lambda: F.cross_entropy(input.clone(), classes()), lambda: added_in_place(input.clone())):
            expected = forward()
            _, found = seen(forward)
            torch.testing.assert_close(found.sum, expected * 4)


def test_another_mean_that_is_not_in_the_loss_does_not_count() -> None:
    input = scores(6, CLASSES)

    def forward() -> Any:
        return SimpleNamespace(loss=F.cross_entropy(input, classes()), error=F.mse_loss(input, input.detach() + 1))

    assert (seen(forward)[1].count, seen(forward)[1].others) == (4, ())


def test_the_counts_of_several_means_are_told() -> None:
    input = scores(6, CLASSES)
    loss, found = seen(lambda: F.cross_entropy(input, classes()) + 3 * F.mse_loss(input, torch.zeros(6, CLASSES)))
    assert (found.count, *found.others) == (4, 24)
    torch.testing.assert_close(found.sum, loss * 4)


def masked(input: Tensor) -> Tensor:
    mask = torch.tensor([1.0, 1, 0, 1, 0, 0])
    return (input.square().mean(1) * mask).sum() / mask.sum()


def test_a_quotient_that_the_model_makes_itself() -> None:
    input = scores(6, CLASSES)
    loss, found = seen(lambda: masked(input))
    assert found.count == 3
    torch.testing.assert_close(found.sum, loss * 3)
    assert torch.equal(loss, masked(input))


def test_the_mean_of_a_tensor_that_the_model_makes_itself() -> None:
    input = scores(6, CLASSES)
    loss, found = seen(lambda: input.square().mean())
    assert found.count == 24
    torch.testing.assert_close(found.sum, loss * 24)


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize(
    ("forward", "named"),
    [
        (lambda x: F.cross_entropy(x, classes(), reduction="sum"), r"cross_entropy\(reduction='sum'\)"),
        (lambda x: F.cross_entropy(x, classes(), reduction="sum") / 7, r"cross_entropy\(reduction='sum'\)"),
        (lambda x: F.l1_loss(x, x.detach(), reduction="none").sum(1).mean() * 2, r"l1_loss\(reduction='none'\)"),
        (lambda x: F.cross_entropy(x, classes(), size_average=False), "cross_entropy"),
        (lambda x: F.cross_entropy(x, classes()) + F.l1_loss(x, x.detach(), reduction="sum") / 3, "l1_loss"),
        (lambda x: x.square().sum(), "none of the loss functions"),
        (lambda x: x.square().mean() / torch.tensor(3.0), "none of the loss functions"),
        (lambda x: x.square().mean() / x.abs().max(), "none of the loss functions"),
    ],
)  # fmt: skip
def test_a_loss_whose_divisor_cannot_be_seen_is_refused(forward: Callable[[Tensor], Tensor], named: str) -> None:
    input = scores(6, CLASSES)
    with pytest.raises(UnsupportedModule, match=f"cannot be seen; got {named}.*pass a loss_fn"):
        seen(lambda: forward(input))


@pytest.mark.parametrize(
    "output",
    [
        {"logits": 1},
        SimpleNamespace(loss=None),
        (scores(2), scores(2)),
        torch.randn(3, 3),
        torch.ones(1),
        (torch.ones(()), torch.ones(())),
    ],
)
def test_a_model_without_a_loss_is_refused(output: Any) -> None:
    with pytest.raises(InputError, match=r"the model returned no loss; got .*put the labels into the batch"):
        seen(lambda: output)


@pytest.mark.parametrize("wrap", [lambda loss: {"loss": loss}, lambda loss: (torch.ones(2), loss), lambda loss: loss])
def test_where_the_loss_is_found(wrap: Callable[[Tensor], Any]) -> None:
    input = scores(6, CLASSES)
    assert seen(lambda: wrap(F.cross_entropy(input, classes())))[1].count == 4


# Hugging Face's models: over micro-batches, the loss and the gradients of the whole batch.


def ids() -> Tensor:
    return torch.randint(5, VOCABULARY, (ROWS, SEQUENCE))


def labels(of: Tensor) -> Tensor:
    made = of.clone()
    for row, learned in enumerate(LEARNED):
        made[row, : SEQUENCE - learned] = -100
    return made


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


def text(name: str, config: str = "Bert", **more: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{config}Config")(**{**SMALL, **more})
    torch.manual_seed(3)
    return getattr(transformers, name)(config).double().eval()


def causal() -> tuple[nn.Module, dict[str, Any]]:
    tokens = ids()
    return text("LlamaForCausalLM", "Llama"), {"input_ids": tokens, "labels": labels(tokens)}


def masked_words() -> tuple[nn.Module, dict[str, Any]]:
    tokens = ids()
    return text("BertForMaskedLM"), {"input_ids": tokens, "labels": labels(tokens)}


def t5() -> tuple[nn.Module, dict[str, Any]]:
    tokens = ids()
    more = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    return text("T5ForConditionalGeneration", "T5", **more), {"input_ids": tokens, "labels": labels(tokens)}


def bart() -> tuple[nn.Module, dict[str, Any]]:
    tokens = ids()
    more = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
        "dropout": 0.0, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2,
    }  # fmt: skip
    return text("BartForConditionalGeneration", "Bart", **more), {"input_ids": tokens, "labels": labels(tokens)}


def classification(target: Tensor, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    return text("BertForSequenceClassification", **more), {"input_ids": ids(), "labels": target}


def answers() -> tuple[nn.Module, dict[str, Any]]:
    start = torch.randint(0, SEQUENCE, (ROWS,))
    end = torch.randint(0, SEQUENCE, (ROWS,))
    start[1] = end[1] = 100  # outside of the text: ignored
    return text("BertForQuestionAnswering"), {"input_ids": ids(), "start_positions": start, "end_positions": end}


def pretraining() -> tuple[nn.Module, dict[str, Any]]:
    """Two words masked in each sample: 2 of one count for 1 of the other, wherever one cuts."""
    tokens = ids()
    words = torch.full_like(tokens, -100)
    words[:, 3:5] = tokens[:, 3:5]
    sentences = torch.randint(0, 2, (ROWS,))
    return text("BertForPreTraining"), {"input_ids": tokens, "labels": words, "next_sentence_label": sentences}


def picture_patches() -> tuple[nn.Module, dict[str, Any]]:
    """Its own quotient, of a mask that it draws: the same one for every row here."""
    more = {
        "image_size": 8, "patch_size": 4, "num_channels": 1, "decoder_hidden_size": 16, "decoder_intermediate_size": 24,
        "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1,
    }  # fmt: skip
    noise = torch.rand(1, 4).expand(ROWS, 4).double()
    return text("ViTMAEForPreTraining", "ViTMAE", **more), {
        "pixel_values": torch.randn(ROWS, 1, 8, 8).double(),
        "noise": noise,
    }


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "causal LM": causal,
    "masked LM": masked_words,
    "T5": t5,
    "BART": bart,
    "one class": lambda: classification(torch.randint(0, 3, (ROWS,)), num_labels=3),
    "regression": lambda: classification(torch.randn(ROWS).double(), num_labels=1),
    "several classes": lambda: classification(torch.randint(0, 2, (ROWS, 3)).double(), num_labels=3),
    "token classes": lambda: (
        text("BertForTokenClassification", num_labels=3),
        {"input_ids": ids(), "labels": labels(torch.randint(0, 3, (ROWS, SEQUENCE)))},
    ),
    "answers": answers,
    "pretraining": pretraining,
    "masked autoencoder": picture_patches,
}


def summed(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Sequence[OwnLoss]]:
    """Loss and gradients over the micro-batches, by their sums and counts."""
    total, count, found = torch.zeros(()), 0.0, []
    for rows in PARTS:
        piece = {name: value[rows] for name, value in batch.items()}
        with Means() as means:
            output = model(**piece)
        own = means.of(output)
        own.sum.backward()
        total, count = total + own.sum.detach(), count + float(own.count)
        found.append(own)
    return total / count, {name: p.grad / count for name, p in model.named_parameters() if p.grad is not None}, found


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many models take the logits to float32."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


SHORT: dict[str, float] = {"rtol": 1e-5, "atol": 1e-7}
"""of models whose norms compute in float32, whatever they are in"""


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", MODELS)
def test_sums_and_counts_give_the_loss_of_the_whole_batch(name: str) -> None:
    close = SHORT if name in ("T5", "causal LM") else {"rtol": 1e-9, "atol": 1e-13}
    model, batch = MODELS[name]()
    whole = model(**batch).loss
    whole.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, gradients, _ = summed(model, batch)
    torch.testing.assert_close(loss.double(), whole.detach(), **close)
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter], **close, msg=parameter)


def test_a_causal_language_model_has_the_bits_of_sums_by_hand() -> None:
    model, batch = causal()
    model.float()
    total = sum(LEARNED) - 1  # the first token of a row is nobody's target
    loss, gradients, _ = summed(model, batch)
    model.zero_grad()
    expected = torch.zeros(())
    for rows in PARTS:
        target = F.pad(batch["labels"][rows], (0, 1), value=-100)[:, 1:].reshape(-1)
        logits = model(batch["input_ids"][rows]).logits.view(-1, VOCABULARY)
        part = F.cross_entropy(logits, target, reduction="sum")
        part.backward()
        expected = expected + part.detach()
    assert torch.equal(loss, expected / total)
    for name, parameter in model.named_parameters():
        assert torch.equal(gradients[name], parameter.grad / total), name


@pytest.mark.usefixtures("exact")
def test_a_loss_with_that_of_routers_weighs_by_tokens_as_a_whole() -> None:
    tokens = ids()
    model = text(
        "MixtralForCausalLM", "Mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.7
    )
    model.config._experts_implementation = "eager"  # grouped products know no float64
    batch = {"input_ids": tokens, "labels": labels(tokens)}
    loss, gradients, found = summed(model, batch)
    model.zero_grad()
    counts = [8.0, 5.0, 6.0]  # of the rows in PARTS; a first token of a row is nobody's target
    assert [float(own.count) for own in found] == counts
    expected = torch.zeros(())
    for rows, count in zip(PARTS, counts, strict=True):
        part = model(**{name: value[rows] for name, value in batch.items()}).loss * count / sum(counts)
        part.backward()
        expected = expected + part.detach()
    torch.testing.assert_close(loss.double(), expected.double(), **SHORT)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, **SHORT, msg=name)


def test_pairs_that_are_contrasted_weigh_by_pairs() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=dict(vocab_size=VOCABULARY, max_position_embeddings=SEQUENCE, eos_token_id=2, **small),
        vision_config=dict(image_size=8, patch_size=4, **small), projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(config).double().eval()
    pairs = {"input_ids": ids(), "pixel_values": torch.randn(ROWS, 3, 8, 8).double(), "return_loss": True}
    loss, own = seen(lambda: model(**pairs))
    assert (own.count, *own.others) == (ROWS, ROWS)
    torch.testing.assert_close(own.sum, loss.loss * ROWS)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_speech_is_a_mean_only_if_the_model_says_so(reduction: str) -> None:
    model = text(
        "Wav2Vec2ForCTC", "Wav2Vec2", ctc_loss_reduction=reduction, conv_dim=(8, 8), conv_stride=(4, 4),
        conv_kernel=(4, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        feat_proj_dropout=0.0, hidden_dropout=0.0, feat_extract_norm="layer",
    )  # fmt: skip
    batch = {"input_values": torch.randn(ROWS, 400).double(), "labels": labels(ids())}
    batch["labels"][2, 0] = 7  # torch's gradient of a sequence without a target is of no use
    if reduction == "sum":
        with pytest.raises(UnsupportedModule, match="ctc_loss"):
            summed(model, batch)
        return
    whole = model(**batch).loss
    torch.testing.assert_close(summed(model, batch)[0], whole.detach(), rtol=1e-6, atol=0)  # it is in float32
