"""``pipex bench drop-in`` runs torch's schedules both ways, checks them and keeps its floors."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining.stage import _PipelineStageBase

from pipex.bench import drop_in
from pipex.bench.driver import Rounds
from pipex.bench.drop_in import Case
from pipex.bench.step import TimedStep
from pipex.cli import main
from pipex.errors import InputError
from pipex.runtime import launch

TINY = ["bench", "drop-in", "--ranks", "2", "-n", "1", "-w", "0", "--json"]


def test_both_providers_get_the_gradients_of_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*TINY, "--min-ratio", "zbv/2=1e9"])
    output = capsys.readouterr()
    rows = json.loads(output.out.splitlines()[-1])["rows"]
    assert [(row["case"], row["provider"], row["shape"]) for row in rows] == [
        (case, provider, [2, 16, 64]) for case in ("zbv/2", "interleaved-zb/2") for provider in ("pipex", "torch")
    ]
    assert all(row["correct"] is True and row["p50_us"] > 0 for row in rows)
    assert code == 1
    assert "pipex bench: zbv/2: ratio of pipex is " in output.err


def test_one_bit_is_a_wrong_result_of_pipex_and_none_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    right = drop_in._Step.run

    def wrong(step: drop_in._Step) -> list[Tensor]:
        *others, last = right(step)
        return [*others, last * (1 + torch.finfo(torch.float32).eps)]

    monkeypatch.setattr(drop_in._Step, "run", wrong)
    monkeypatch.setattr(
        launch, "_why_afresh", lambda device, ranks: None
    )  # ranks started afresh would not see the damage
    assert [row.correct for row in drop_in.measure([Case("zbv", 2)], Rounds(1, 0))] == [False, True]


def test_only_the_steps_of_pipex_run_under_drop_in(monkeypatch: pytest.MonkeyPatch) -> None:
    torchs_own = _PipelineStageBase.backward_one_chunk

    class Watched(TimedStep):
        def sample(self) -> float:
            time = super().sample()
            replaced = _PipelineStageBase.backward_one_chunk is not torchs_own
            self.correct = self.correct and replaced == (self._tolerance == 0)
            return time

    monkeypatch.setattr(drop_in, "TimedStep", Watched)
    monkeypatch.setattr(launch, "_why_afresh", lambda device, ranks: None)
    assert [row.correct for row in drop_in.measure([Case("interleaved-zb", 2)], Rounds(1, 0))] == [True, True]


def test_the_slowest_rank_makes_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [
        {"samples": {"pipex": [900.0, 100.0], "torch": [2000.0, 2000.0]}, "correct": {"pipex": True, "torch": True}},
        {"samples": {"pipex": [700.0, 700.0], "torch": [100.0, 100.0]}, "correct": {"pipex": False, "torch": True}},
    ]
    monkeypatch.setattr(drop_in, "launch", lambda *args, **kwargs: ranks)
    pipex, torch_ = drop_in.measure([Case("zbv", 2)], Rounds(2, 0))
    assert (pipex.time.p50, pipex.ratio, pipex.correct) == (800.0, 2.5, False)
    assert (torch_.time.p50, torch_.ratio, torch_.correct) == (2000.0, 1.0, True)


def test_every_schedule_meets_every_number_of_ranks() -> None:
    found = drop_in.cases("zbv,interleaved-zb", "2,4")
    assert [case.name for case in found] == ["zbv/2", "interleaved-zb/2", "zbv/4", "interleaved-zb/4"]
    assert [found[2].stages_of(rank) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert [found[3].stages_of(rank) for rank in range(4)] == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(
    ("schedules", "ranks", "message"),
    [
        ("1f1b", "2", "not a schedule of torch's that splits its backward; got '1f1b'; needed one of zbv, inter"),
        ("zbv", "1", "not a number of ranks; got '1'; needed at least 2"),
        ("zbv", "two", "not a number of ranks; got 'two'"),
    ],
)
def test_bad_cases_are_named(schedules: str, ranks: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        drop_in.cases(schedules, ranks)
