"""How much waits for W is seen in one split micro-batch, and said once where it is little."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from module_kinds import WIDTH, opaque, square
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch_group import in_group

import pipex
from pipex.backward import Splitter
from pipex.backward.waiting import Waiting, warn_if_few_wait


def looked_at(module: nn.Module, micro_batches: int = 1) -> Waiting:
    splitter, waiting = Splitter.of(module), Waiting(module, 3)
    for _ in range(micro_batches):
        x = torch.randn(2, 4, WIDTH, requires_grad=True)
        with splitter.record() as tape:
            y = module(x)
        with waiting.look():
            tape.backward_input([y], [torch.ones_like(y)], [x])
        tape.backward_weight()
    return waiting


def test_what_waits_is_counted_in_elements_of_weights() -> None:
    """Biases, norms and what is frozen do not count."""
    frozen = opaque().requires_grad_(False)
    waiting = looked_at(nn.Sequential(square(), nn.LayerNorm(WIDTH), frozen, opaque(), nn.Linear(WIDTH, 3 * WIDTH)))
    assert (waiting.waiting, waiting.weights) == (4 * WIDTH**2, 5 * WIDTH**2)
    assert waiting.share == 0.8
    assert waiting.first == "3"


def test_a_stage_without_weights_waits() -> None:
    waiting = looked_at(nn.LayerNorm(WIDTH))
    assert (waiting.share, waiting.first) == (1, None)
    assert warn_if_few_wait([waiting])


def test_hooks_are_gone_after_the_first_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(square(), opaque())
    waiting = looked_at(module)
    monkeypatch.setattr(waiting, "take", lambda roots: pytest.fail("it looks again"))
    share = waiting.share
    y = module(torch.randn(2, 4, WIDTH))
    with waiting.look():
        y.sum().backward()  # reaches both weights
    assert waiting.share == share == 0.5


def test_a_rank_of_whose_weight_gradients_few_wait_is_warned_of() -> None:
    some, none = looked_at(nn.Sequential(square(), opaque())), looked_at(nn.Sequential(nn.Tanh(), opaque()))
    none.index = 4
    with pytest.warns(
        UserWarning, match=r"only 33% wait for W; the first module whose do not is 1 of stage 3;"
    ) as found:
        assert warn_if_few_wait([some, none])
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        assert warn_if_few_wait([some])
        assert not warn_if_few_wait([Waiting(square())]), "nothing was seen"


def few_wait() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(square(), opaque(), nn.Tanh(), opaque())


def told(run: Callable[[], object]) -> list[str]:
    """The warnings of what runs."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [str(one.message).partition(";")[0] for one in found if "the plan splits" in str(one.message)]


ONLY = "the plan splits backwards, but of the weight gradients of this rank only {} wait for W"


@pytest.mark.parametrize(("module", "warned"), [(few_wait, [ONLY.format("33%")]), (square, [])])
def test_a_pipeline_warns_once(module: Callable[[], nn.Module], warned: list[str]) -> None:
    plan = pipex.build("v-min", 1, 4)
    sgd = partial(torch.optim.SGD, lr=0.1)
    pipeline = pipex.Pipeline([module(), module()], plan, nn.functional.mse_loss, optimizer=sgd)
    x = torch.randn(8, 4, WIDTH)
    assert told(lambda: [pipeline.step(x, x) for _ in range(2)]) == warned


def test_a_plan_that_splits_nothing_is_not_warned_of() -> None:
    plan = pipex.build("1f1b", 1, 4)
    pipeline = pipex.Pipeline([few_wait()], plan, nn.functional.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.1))
    x = torch.randn(8, 4, WIDTH)
    assert told(lambda: pipeline.step(x, x)) == []


@pytest.mark.parametrize(("module", "warned"), [(few_wait, [ONLY.format("33%")]), (square, [])])
def test_drop_in_warns_once(module: Callable[[], nn.Module], warned: list[str], tmp_path: Path) -> None:
    x = torch.randn(4, 4, WIDTH)
    order = tmp_path / "order.csv"
    order.write_text("0F0,1F0,1I0,0I0,1W0,0W0,0F1,1F1,1I1,0I1,1W1,0W1\n")

    def train() -> None:
        stages = [
            PipelineStage(module(), index, 2, torch.device("cpu"), x[:2].clone().requires_grad_(index > 0),
                          output_args=x[:2].clone().requires_grad_())
            for index in range(2)
        ]  # fmt: skip
        schedule = schedules._PipelineScheduleRuntime(stages, 2, loss_fn=nn.functional.mse_loss)
        schedule._load_csv(str(order))
        with pipex.drop_in():
            for _ in range(2):
                schedule.step(x, target=x, losses=[])

    assert told(lambda: in_group(tmp_path / "store", 0, 1, train)) == warned
