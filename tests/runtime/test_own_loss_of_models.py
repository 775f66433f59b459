"""``loss_fn="model"`` of Hugging Face's models, beside the same models as they are, in one process.

Only ranks that hold a first stage have the batch. There is padding, and each micro-batch has another number of labels
of -100.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import host_world
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipex
from pipex.errors import InputError, UnsupportedModule

transformers = pytest.importorskip("transformers")

ROWS, MICROBATCHES, SEQUENCE, VOCABULARY = 8, 4, 10, 40
LEARNED = (10, 3, 0, 0, 7, 2, 1, 5)  # tokens of each row; a micro-batch of two rows has none

Batch = dict[str, Tensor]
Case = Callable[[], tuple[nn.Module, Batch]]


def language(step: int) -> Batch:
    ids = torch.randint(5, VOCABULARY, (ROWS, SEQUENCE - step % 2), generator=torch.Generator().manual_seed(step))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, learned in enumerate(LEARNED):
        labels[row, : max(0, ids.shape[1] - learned)] = -100
        padding = row % 3
        ids[row, ids.shape[1] - padding :], mask[row, ids.shape[1] - padding :] = 0, 0
        labels[row, ids.shape[1] - padding :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def of(name: str, config: str, **more: Any) -> nn.Module:
    torch.manual_seed(3)
    model: nn.Module = getattr(transformers, name)(getattr(transformers, f"{config}Config")(**more))
    return model


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def llama() -> nn.Module:
    return of("LlamaForCausalLM", "Llama", **SMALL)


def mixtral() -> nn.Module:
    return of("MixtralForCausalLM", "Mixtral", **SMALL, num_key_value_heads=2, num_local_experts=4,
              output_router_logits=True, router_aux_loss_coef=0.7)  # fmt: skip


def t5() -> nn.Module:
    return of("T5ForConditionalGeneration", "T5", vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2,
              num_heads=2, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)  # fmt: skip


def masked_words() -> nn.Module:
    return of("BertForMaskedLM", "Bert", **SMALL, **STILL)


def answers() -> nn.Module:
    return of("BertForQuestionAnswering", "Bert", **SMALL, **STILL)


def spans(step: int) -> Batch:
    batch = language(step)
    del batch["labels"]
    chance = torch.Generator().manual_seed(step)
    ends = torch.randint(0, 5, (2, ROWS), generator=chance)
    ends[:, 3] = ends[:, 4] = 100  # outside of the text: ignored
    return {**batch, "start_positions": ends[0], "end_positions": ends[1]}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "Llama": (llama, language),
    "T5": (t5, language),
    "BERT, masked words": (masked_words, language),
    "BERT, answers": (answers, spans),
    "Mixtral": (mixtral, language),
}

Found = tuple[list[float], list[dict[str, Tensor]]]


def train(name: str, family: str) -> Found:
    world, (make, data) = pipex.current_world(), MODELS[name]
    plan = pipex.build(family, world.ranks, MICROBATCHES)
    stages = pipex.split_model(make(), plan, sample={key: value[:2] for key, value in data(0).items()})
    seen: list[dict[str, Tensor]] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=0.1)
        made.register_step_pre_hook(lambda *_: seen.append({n: p.grad.clone() for n, p in parameters.named}))
        return made

    pipe = pipex.Pipeline(stages, plan, "model", optimizer=optimizer)
    losses, firsts = [], {plan.placement.rank_of(stages[0]) for stages in plan.placement.pipes}
    for step in range(3):
        batch = data(step) if world.rank in firsts else None
        losses += [pipe.evaluate(batch), pipe.step(batch)]
    return losses, seen


def in_one_process(name: str) -> Found:
    """Of the whole batch; where routers have a share in the loss, of each micro-batch, weighed by its tokens."""
    make, data = MODELS[name]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, seen = [], []

    def loss_of(batch: Batch) -> Tensor:
        if name != "Mixtral":
            return model(**batch).loss
        pieces = [
            dict(zip(batch, values, strict=True)) for values in zip(*(v.split(2) for v in batch.values()), strict=True)
        ]
        counts = [int((piece["labels"][:, 1:] != -100).sum()) for piece in pieces]
        return sum(
            model(**piece).loss * count / sum(counts) for piece, count in zip(pieces, counts, strict=True) if count
        )

    for step in range(3):
        with torch.no_grad():
            losses.append(loss_of(data(step)).item())
        loss = loss_of(data(step))
        loss.backward()
        losses.append(loss.item())
        seen.append({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    return losses, seen


@pytest.mark.parametrize(
    ("name", "family", "ranks"),
    [
        *((name, "zb-h1", 2) for name in MODELS),
        ("Llama", "1f1b", 4), ("Llama", "zbv", 2), ("Llama", "dualpipe", 2),
        ("Mixtral", "zbv", 2), ("BERT, answers", "1f1b", 3),
    ],
)  # fmt: skip
def test_the_loss_and_its_gradients_are_those_of_the_model_on_the_whole_batch(
    name: str, family: str, ranks: int
) -> None:
    losses, gradients = in_one_process(name)
    found = host_world.launch(train, ranks, args=(name, family))
    for theirs, _ in found:
        torch.testing.assert_close(theirs, losses, rtol=2e-6, atol=0)
    for step, expected in enumerate(gradients):
        merged = {parameter: gradient for _, seen in found for parameter, gradient in seen[step].items()}
        assert merged.keys() == expected.keys()
        for parameter, gradient in expected.items():
            off = (merged[parameter] - gradient).norm()
            # That of a key's bias is nothing but rounding.
            assert off < 2e-5 * gradient.norm() + 1e-7, (step, parameter, off)


def test_a_language_model_has_the_bits_of_sums_by_hand() -> None:
    found = host_world.launch(train, 2, args=("Llama", "zb-h1"))
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        count, value = 0, torch.zeros(())
        batch = language(step)
        for ids, mask, labels in zip(*(batch[key].split(2) for key in batch), strict=True):
            target = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
            logits = model(ids, attention_mask=mask, use_cache=False).logits.view(-1, VOCABULARY)
            loss = F.cross_entropy(logits, target, reduction="sum")
            loss.backward()
            count, value = count + int((target != -100).sum()), value + loss.detach()
        for parameter in model.parameters():
            parameter.grad /= count
        for losses, seen in found:
            assert losses[2 * step + 1] == (value / count).item()
            for name, gradient in seen[step].items():
                assert torch.equal(gradient, model.get_parameter(name).grad), name
        optimizer.step()
        optimizer.zero_grad()


def test_a_sample_without_labels_is_refused_when_the_pipeline_is_made() -> None:
    batch = language(0)
    labels = batch.pop("labels")
    stages, plan = pipex.split_model(llama(), 1, sample=batch), pipex.build("1f1b", 1, MICROBATCHES)
    with pytest.raises(InputError, match="none in what it has returned for the sample"):
        pipex.Pipeline(stages, plan, "model")
    pipe = pipex.Pipeline(stages, plan, lambda output, target: (output.logits.sum(), 1))
    assert pipe.evaluate(batch, labels) == pytest.approx(llama()(**batch).logits.sum().item() / 4, rel=1e-5)


def test_a_model_whose_loss_is_a_sum_is_refused_by_its_name() -> None:
    model, batch = llama(), language(0)
    model.loss_function = lambda logits, labels, vocab_size, **_: F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    plan = pipex.build("1f1b", 1, MICROBATCHES)
    stages = pipex.split_model(model, 1, sample=batch)
    pipe = pipex.Pipeline(stages, plan, "model", optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(UnsupportedModule, match=r"cross_entropy\(reduction='sum'\)"):
        pipe.step(batch)
