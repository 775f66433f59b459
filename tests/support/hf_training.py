"""Hugging Face models trained by pipelines, and by plain transformers in one process, which is what they must equal."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hf_batches import Batch
from hf_zoo import Example
from torch import Tensor, nn

import pipex
from pipex.errors import UnsupportedModule

STEPS = 2

Cell = tuple[str, int, int, int]
"""Schedule, ranks, chunks, micro-batches."""


@dataclass(frozen=True)
class Job:
    """A model, how it is cut, and what trains it.

    Attributes:
        counts: units of each stage.
        rows: of a batch.
    """

    example: Example
    cell: Cell
    counts: tuple[int, ...]
    rows: int

    @property
    def microbatches(self) -> int:
        return self.cell[3]


@cache
def units(example: Example) -> int:
    """How many a model has."""
    model = example.model()
    (stage,) = pipex.split_model(model, 1, sample=example.batch(model, 0, 2), verify=False, layers=example.layers)
    return len(stage.layers)


def draw(example: Example, cells: Sequence[Cell], chance: random.Random) -> Job:
    """A cell that the model has enough units for, and a cut as uneven as it comes."""
    many = units(example)
    plans = [(cell, pieces) for cell in cells if (pieces := plan_of(cell).placement.pieces) <= many]
    cell, pieces = chance.choice(plans)
    borders = sorted(chance.sample(range(1, many), pieces - 1))
    counts = tuple(b - a for a, b in zip([0, *borders], [*borders, many], strict=True))
    least = 2 if example.norms_batches else 1  # no batch norm of one sample
    return Job(example, cell, counts, cell[3] * chance.randint(least, 2) + chance.randint(0, 1))


def plan_of(cell: Cell) -> pipex.Plan:
    schedule, ranks, chunks, microbatches = cell
    return pipex.build(schedule, ranks, microbatches, chunks=chunks)


def cut(batch: Batch, microbatches: int) -> list[Batch]:
    """Of 10 rows in 4: 3, 3, 2 and 2. Tensors with several rows for each sample are cut alike."""
    rows = len(batch["labels"] if "labels" in batch else batch["input_ids"])
    samples = [len(part) for part in torch.arange(rows).tensor_split(microbatches)]
    parts = {name: t.split([n * (len(t) // rows) for n in samples]) for name, t in batch.items()}
    return [{name: parts[name][m] for name in batch} for m in range(microbatches)]


def is_ragged(batch: Batch) -> bool:
    """Whether some tensors have more rows than there are samples, so that micro-batches must be ready."""
    return len({len(tensor) for tensor in batch.values()}) > 1


def optimizer(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def rank_train(jobs: list[Job]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [train(job) for job in jobs]


def train(job: Job) -> dict[str, Any]:
    """By a pipeline. Returns losses, this rank's gradients of each step, and its tensors after the last one; or why the
    model cannot be cut so."""
    example = job.example
    model = example.model()
    plan = plan_of(job.cell)
    sample = cut(example.batch(model, 0, job.rows), job.microbatches)[0]
    try:
        stages = pipex.split_model(model, plan, list(job.counts), sample=sample, layers=example.layers)
    except UnsupportedModule as error:
        return {"refused": str(error)}
    pipeline = pipex.Pipeline(stages, plan, "model", optimizer=optimizer)
    found: dict[str, Any] = {"gradients": []}
    if pipeline.optimizer is not None:
        pipeline.optimizer.register_step_pre_hook(lambda *_: found["gradients"].append(_gradients(pipeline)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no gradient came to")  # not every model uses all of its parameters
        found["losses"] = [pipeline.step(_ready(job, example.batch(model, n + 1, job.rows))) for n in range(STEPS)]
    found["tensors"] = {name: t.detach().clone() for stage in pipeline.local_stages for name, t in stage.names.items()}
    found["evaluated"] = pipeline.evaluate(_ready(job, example.batch(model, STEPS + 1, job.rows)))
    pipeline.close()
    return found


def _ready(job: Job, batch: Batch) -> Batch | list[Batch]:
    return cut(batch, job.microbatches) if is_ragged(batch) else batch


def _gradients(pipeline: pipex.Pipeline) -> dict[str, Tensor]:
    return {
        name: tensor.grad.clone()
        for stage in pipeline.local_stages
        for name, tensor in stage.names.items()
        if tensor.grad is not None
    }


def plain(job: Job) -> dict[str, Any]:
    """As ``train``, by transformers and torch alone: the sum of all losses, divided by all counts at once."""
    torch.set_num_threads(1)
    example = job.example
    model = example.model()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    steps = optimizer(parameters.values())
    found: dict[str, Any] = {"losses": [], "gradients": [], "tied": _tied(model)}
    for step in range(1, STEPS + 1):
        batch = example.batch(model, step, job.rows)
        if step == 1:
            found["whole"] = _whole(example, batch)
        steps.zero_grad()
        sums, counts = [], []
        for micro in cut(batch, job.microbatches):
            total, count = example.losses(model(**micro), micro)
            total.backward()
            sums.append(total.detach())
            counts.append(float(count))
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.grad /= sum(counts)
        found["losses"].append((_sum(sums) / sum(counts)).item())
        found["gradients"].append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
        steps.step()
    found["tensors"] = {name: t.detach().clone() for name, t in model.state_dict().items()}
    model.eval()
    batch = example.batch(model, STEPS + 1, job.rows)
    with torch.no_grad():
        pairs = [example.losses(model(**micro), micro) for micro in cut(batch, job.microbatches)]
    found["evaluated"] = (_sum([total for total, _ in pairs]) / sum(float(count) for _, count in pairs)).item()
    return found


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    first, *rest = tensors
    for other in rest:
        first = first + other
    return first


def _whole(example: Example, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients as the model itself has them on the whole batch."""
    model = example.model()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _tied(model: nn.Module) -> dict[str, int]:
    """Parameters that stand in several places, or in a layer that is called several times; in how many."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = {name: len(those) for those in names.values() if len(those) > 1 for name in those}
    again = {name: model.config.num_hidden_layers for name, _ in model.named_parameters() if "albert_layers" in name}
    return found | again


TIED = 1e-7
"""Of a tied gradient's norm, for each place but one: its parts are added in another order than in one process."""

ROUNDED = 5e-4
"""Of a gradient's norm, between the whole batch and its micro-batches: sums of up to 300 float32 numbers in another
order, layer after layer; 1.3e-4 was the most (adapters with random weights, soft-caps). A mean over other numbers of
tokens is off by some percent."""


def compare(job: Job, results: Sequence[dict[str, Any]], expected: dict[str, Any]) -> None:
    tied = expected["tied"]
    for result in results:
        for name in ("losses", "evaluated"):
            if tied:  # the first update differs in the last bit, and so does what comes after it
                torch.testing.assert_close(torch.tensor(result[name]), torch.tensor(expected[name]), rtol=1e-6, atol=0)
            else:
                assert result[name] == expected[name], name
        assert result["losses"][0] == expected["losses"][0]
        for step, found in enumerate(result["gradients"]):
            norm = _norm(expected["gradients"][step].values())
            for name, gradient in found.items():
                close = TIED * (tied.get(name, 1) - 1)
                if step and tied:
                    close = max(close, 10 * TIED)
                _same(f"the gradient of {name} in step {step + 1}", gradient, expected["gradients"][step][name], close,
                      close * norm if step else 0.0)  # fmt: skip
        for name, tensor in result["tensors"].items():
            _same(name, tensor, expected["tensors"][name], 10 * TIED if tied else 0.0)
    assert _names(result["gradients"][0] for result in results if result["gradients"]) == set(expected["gradients"][0])
    first = _names(result["tensors"] for result in results)
    assert first | tied.keys() == expected["tensors"].keys() | tied.keys()
    if job.example.is_mean:
        loss, gradients = expected["whole"]
        norm = _norm(gradients.values())
        assert abs(results[0]["losses"][0] - loss) <= 2e-6 * abs(loss)
        for result in results:
            for name, gradient in result["gradients"][0].items() if result["gradients"] else ():
                _same(f"the whole batch's gradient of {name}", gradient, gradients[name], ROUNDED, 1e-6 * norm)


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def _names(found: Iterable[dict[str, Tensor]]) -> set[str]:
    return set().union(*found)


def _same(what: str, found: Tensor, expected: Tensor, relative: float, absolute: float = 0.0) -> None:
    """``relative``: to its norm. Some gradients are 0 but for rounding, as those of a key's bias."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    if torch.equal(found, expected):
        return
    apart, norm = (found - expected).double().norm().item(), expected.double().norm().item()
    assert apart <= relative * norm + absolute, f"{what}: off by {apart:.2e} of {norm:.2e}"
