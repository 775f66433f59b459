from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from pipex.bench import pairs
from pipex.cli import main
from pipex.errors import InputError
from pipex.events import Event
from pipex.observe import Recorder
from pipex.plan import build

TINY = ["bench", "pairs", "--shapes", "8x2", "-m", "3", "-n", "2", "-w", "1", "--json"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "at_once"), [(2, 1), (1, 0)])
def test_both_providers_have_the_losses_of_one_process(
    cores: int, at_once: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipex.runtime.pairs.cores_of", lambda world: cores)
    monkeypatch.setattr(pairs, "cores_of", lambda world: cores)
    code = main([*TINY, "--min-ratio", "8x2=1e9"])
    output = capsys.readouterr()
    ours, apart = json.loads(output.out.splitlines()[-1])["rows"]
    assert [(row["case"], row["provider"], row["shape"], row["correct"]) for row in (ours, apart)] == [
        ("8x2", "pipex", [3, 2, 8], True), ("8x2", "apart", [3, 2, 8], True)
    ]  # fmt: skip
    assert (ours["at_once"], apart["at_once"]) == (at_once, 0)
    assert ours["ratio"] == pytest.approx(apart["p50_us"] / ours["p50_us"], rel=1e-3)
    assert ours["overlap"] > 0
    assert apart["overlap"] == apart["ratio"] == 1
    assert ("8x2, rank 0: rank 0 has one core" in output.err) == (not at_once)
    assert code == 1
    assert "pipex bench: 8x2: ratio of pipex is " in output.err


def test_a_pair_takes_the_time_in_which_a_part_of_it_ran() -> None:
    plan = build("dualpipev", 1, 2)
    (pair,) = (action for action in plan.orders[0] if action.parts)
    names = [str(part) for part in pair.parts]
    recorder = Recorder(2)
    for step, (begin, end) in enumerate([(2e9, 5e9), (4e9, 6e9)], 1):
        recorder(Event(step, names[0][1], int(names[0][0]), int(names[0][2]), int(1e9), int(3e9)))
        recorder(Event(step, names[1][1], int(names[1][0]), int(names[1][2]), int(begin), int(end)))
    assert pairs._pairs(plan, 0, recorder) == [4.0, 4.0]


def test_what_is_no_shape_is_refused() -> None:
    with pytest.raises(InputError, match="not a shape; got '8x'"):
        pairs.cases("dualpipev", "8x2,8x", 1, 4)
