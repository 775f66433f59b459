"""What ``pipex bench overlap`` and ``pipex bench pipeline`` share."""

from __future__ import annotations

import copy

import pytest
import torch

from pipex.bench import training
from pipex.bench.training import Case
from pipex.observe import Event, measure
from pipex.plan import Placement, build


def event(step: int, kind: str, stage: int, begin: int, end: int, microbatch: int = 0) -> Event:
    return Event(step, kind, stage, microbatch, begin, end)


def test_an_action_s_time_is_the_mean_of_a_step_and_of_those_the_median() -> None:
    """The first two of three W leave their work to the third; the third step was disturbed."""
    rank = [
        event(step, "W", 0, begin, begin + length, microbatch)
        for step, lengths in ((1, (0, 0, 1200)), (2, (0, 0, 1500)), (3, (0, 0, 9000)))
        for microbatch, (begin, length) in enumerate(zip((0, 1, 2), lengths, strict=True))
    ]
    other = [event(1, "F", 1, 0, 700), event(1, "RECV_F", 1, 0, 7)]
    assert training.action_times([rank, other]) == {("W", 0): pytest.approx(500e-9), ("F", 1): pytest.approx(700e-9)}


def test_messages_are_simulated_as_they_were_or_free() -> None:
    ranks = [
        [event(1, "F", 0, 0, 500), event(1, "SEND_F", 0, 500, 540), event(1, "RECV_B", 0, 540, 910),
         event(1, "B", 0, 910, 1010)],
        [event(1, "RECV_F", 1, 0, 600), event(1, "F", 1, 600, 700), event(1, "B", 1, 700, 850),
         event(1, "SEND_B", 1, 850, 860)],
    ]  # fmt: skip
    plan, figures = build("1f1b", 2, 1), measure(ranks, Placement("loop", 2))
    assert training.simulated(plan, ranks, figures).makespan == pytest.approx(850e-9 + 2 * (100 + 60) / 2 * 1e-9)
    assert training.simulated(plan, ranks, figures, free=True).makespan == pytest.approx(850e-9)


@pytest.mark.parametrize(
    ("losses", "tolerance", "right"),
    [
        ([2.0, 1.0], 0.0, True),
        ([2.0, 1.0 + 1e-15], 0.0, False),
        ([2.0, 1.001], 1e-3, True),
        ([2.0, 1.003], 1e-3, False),
        ([2.0, float("nan")], 1e-3, False),
    ],
)
def test_losses_are_one_process_s(losses: list[float], tolerance: float, right: bool) -> None:
    assert training.agree(losses, [2.0, 1.0], tolerance) is right


def test_a_missing_loss_is_noticed() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        training.agree([2.0], [2.0, 1.0], 0.0)


def test_every_cut_is_of_the_same_model() -> None:
    case = Case("zbv", 2, 2, "cpu", width=8, tokens=4)
    layers = [[type(layer).__name__ for layer in stage.layers] for stage in case.stages(4)]
    assert layers == [["Embedding", "Block"], ["Block"], ["Block"], ["Block", "Head"]]
    whole = [p for stage in case.stages(1) for p in stage.parameters()]
    training._model.cache_clear()  # as in another process, which has drawn other numbers
    torch.rand(1)
    cut = [p for stage in case.stages(4) for p in stage.parameters()]
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one, other)
        assert one is not other


def test_the_losses_of_later_steps_show_a_missing_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bfloat16 run may be off by is far less than what one block's missing weight gradients make."""
    case = Case("1f1b", 2, 2, "cpu", width=64, tokens=16)
    right = training.losses_of_one_process(case, 3, torch.device("cpu"))
    assert right == training.losses_of_one_process(case, 3, torch.device("cpu"))
    model = training._model

    def frozen(*arguments: object) -> torch.nn.Module:
        found = copy.deepcopy(model(*arguments))  # type: ignore[arg-type]
        found.blocks[1].requires_grad_(False)
        return found

    monkeypatch.setattr(training, "_model", frozen)
    wrong = training.losses_of_one_process(case, 3, torch.device("cpu"))
    assert wrong[0] == right[0]
    for one, other in zip(wrong[1:], right[1:], strict=True):
        assert not training.agree([one], [other], training.TOLERANCE["cuda"])
