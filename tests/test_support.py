"""What decides which cases run, on which processes and with which programs."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import built
import cases
import persistent
import pytest

PAIRS = [(letter, number) for letter in "abc" for number in range(10)] + [("d", 0)]


def in_the_sample(seed: int, count: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    monkeypatch.setattr(cases, "SEED", seed)
    found = cases.sampled(PAIRS, count, name="pairs", stratum=lambda case: case[0])
    assert [case if isinstance(case, tuple) and not hasattr(case, "marks") else case.values for case in found] == PAIRS
    others = [case for case in found if hasattr(case, "marks")]
    assert all([mark.name for mark in case.marks] == ["nightly"] for case in others)
    return [case for case in found if case not in others]


def test_a_sample_has_so_many_of_each_stratum_or_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = in_the_sample(1, 3, monkeypatch)
    assert Counter(letter for letter, _ in drawn) == {"a": 3, "b": 3, "c": 3, "d": 1}
    assert drawn == in_the_sample(1, 3, monkeypatch)


def test_samples_of_enough_runs_are_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {case for seed in range(200) for case in in_the_sample(seed, 1, monkeypatch)}
    assert seen == set(PAIRS)


def test_a_case_keeps_its_name_and_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [pytest.param(number, id=f"number {number}", marks=pytest.mark.long) for number in range(9)]
    found = cases.sampled(given, 1, name="params")
    assert [case.id for case in found] == [case.id for case in given]
    assert sorted(len(case.marks) for case in found) == [1] + [2] * 8


def test_a_failing_case_of_several_is_named() -> None:
    with pytest.raises(AssertionError, match=r"in the case 3, float32: 1 is not 2"), cases.case(3, "float32"):
        raise ValueError("1 is not 2")


def own(number: int) -> tuple[int, int]:
    return number, os.getpid()


def end() -> None:
    os._exit(3)


def test_ranks_stay_until_one_has_died() -> None:
    ranks = persistent.Ranks()
    try:
        first = ranks.results([partial(own, 0), partial(own, 1)])
        assert [number for number, _ in first] == [0, 1]
        assert ranks.results([partial(own, 0), partial(own, 1)]) == first
        assert ranks.outcomes([partial(own, 0), end])[1] == {}
        assert {pid for _, pid in ranks.results([partial(own, 0)])}.isdisjoint({pid for _, pid in first})
    finally:
        ranks.stop()


@pytest.fixture
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The commands that were run, by a compiler that copies; its programs lie in a folder of the test's."""
    run: list[Any] = []

    def copy(command: Any, **_: object) -> None:
        run.append(command)
        *_, source, _, target = command
        target.write_bytes(source.read_bytes())

    built._surroundings()
    monkeypatch.setattr(built, "_version", lambda compiler: f"{compiler} 1")
    monkeypatch.setattr(built, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(subprocess, "run", copy)
    return run


def test_a_program_is_built_once_for_all_who_need_it_at_once(compilers: list[Any], tmp_path: Path) -> None:
    source = tmp_path / "a.cpp"
    source.write_text("int main() {}")
    with ThreadPool(4) as pool:
        found = pool.map(lambda _: built.compiled(["compiler"], [source], ".exe"), range(8))
    assert len(set(found)) == len(compilers) == 1


def test_another_source_or_flag_is_another_program(compilers: list[Any], tmp_path: Path) -> None:
    source = tmp_path / "a.cpp"
    programs = set()
    for text, flag in (("1", "-O0"), ("2", "-O0"), ("2", "-O1")):
        source.write_text(text)
        programs.add(built.compiled(["compiler", flag], [source], ".exe"))
    assert len(programs) == len(compilers) == 3


def test_another_version_of_the_compiler_makes_another_program(
    compilers: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.cpp"
    source.write_text("int main() {}")
    first = built.compiled(["compiler"], [source], ".exe")
    monkeypatch.setattr(built, "_version", lambda compiler: f"{compiler} 2")
    assert built.compiled(["compiler"], [source], ".exe") != first
    assert len(compilers) == 2


def test_old_programs_go_but_not_while_another_process_takes_one(compilers: list[Any], tmp_path: Path) -> None:
    source = tmp_path / "a.cpp"

    def program(text: str) -> Path:
        source.write_text(text)
        return built.compiled(["compiler"], [source], ".exe")

    old = program("1")
    os.utime(old, (0, 0))
    (built.CACHE / "gone.exe").symlink_to("nothing")  # seen in the folder, and not there any more when looked at
    with built._locked(old.with_suffix(".lock")):
        program("2")
        assert old.exists()
    program("3")
    assert not old.exists()
