from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipex.bench.driver import Quantiles
from pipex.bench.report import Floor, Row, failures, finish, parse_floors
from pipex.errors import InputError


def row(provider: str = "host", *, ratio: float = 8.0, correct: bool = True, share: float | None = 0.5) -> Row:
    return Row("4K", provider, {"bytes": 4096}, Quantiles(1.0, 2.0, 4.0), ratio, correct, {"memcpy_share": share})


def test_the_last_line_of_json_has_the_environment_and_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish({"cpu": "abacus"}, [row(), row("gloo", ratio=1.0)], [], as_json=True) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == {
        "environment": {"cpu": "abacus"},
        "rows": [
            {"case": "4K", "provider": "host", "bytes": 4096, "p50_us": 2.0, "p20_us": 1.0, "p80_us": 4.0,
             "ratio": 8.0, "memcpy_share": 0.5, "correct": True},
            {"case": "4K", "provider": "gloo", "bytes": 4096, "p50_us": 2.0, "p20_us": 1.0, "p80_us": 4.0,
             "ratio": 1.0, "memcpy_share": 0.5, "correct": True},
        ],
    }  # fmt: skip
    assert "# cpu: abacus" in output.err


def test_without_json_the_table_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish({"cpu": "abacus"}, [row(share=None), row("gloo", correct=False)], [], as_json=False) == 1
    environment, header, first, second = capsys.readouterr().out.splitlines()
    assert environment == "# cpu: abacus"
    assert header.split() == ["case", "provider", "p50_us", "p20_us", "p80_us", "ratio", "memcpy_share", "correct"]
    assert first.split() == ["4K", "host", "2", "1", "4", "8", "-", "yes"]
    assert second.split() == ["4K", "gloo", "2", "1", "4", "8", "0.5", "WRONG"]
    assert len(header) == len(first) == len(second)


def test_a_missed_floor_fails_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish({}, [row(ratio=7.99)], [Floor("4K", "host", "ratio", 8.0)], as_json=True) == 1
    assert capsys.readouterr().err.endswith("pipex bench: 4K: ratio of host is 7.99, below the floor of 8\n")


def test_a_wrong_result_fails_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish({}, [row(correct=False)], [], as_json=True) == 1
    assert capsys.readouterr().err.endswith("pipex bench: 4K: host gave a wrong result\n")


def test_a_floor_is_met_by_its_own_value() -> None:
    floors = [Floor("4K", "host", "ratio", 8.0), Floor("4K", "host", "memcpy_share", 0.5)]
    assert failures([row(ratio=8.0)], floors) == []
    assert failures([row(ratio=8.0, share=0.49)], floors) == [
        "4K: memcpy_share of host is 0.49, below the floor of 0.5"
    ]


@pytest.mark.parametrize("most", [False, True])
def test_a_figure_that_is_not_there_meets_no_floor(most: bool) -> None:
    floors = [Floor("4K", "host", "memcpy_share", 0.5, most)]
    assert failures([row(share=None)], floors) == [
        "4K: memcpy_share of host could not be measured, and a limit of 0.5 was asked for"
    ]
    assert failures([replace(row(share=None), beyond=("memcpy_share",))], floors) == []  # too good to be seen
    assert len(failures([row(share=float("nan"))], floors)) == 1


def test_a_floor_looks_at_its_own_provider_only() -> None:
    assert failures([row(), row("gloo", ratio=1.0)], [Floor("4K", "host", "ratio", 8.0)]) == []


def test_floors_are_read_as_case_and_number() -> None:
    assert parse_floors("4K=20,1M=0.75", "host", "ratio", ["4K", "1M"]) == [
        Floor("4K", "host", "ratio", 20.0),
        Floor("1M", "host", "ratio", 0.75),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4K", "not a floor; got '4K'; needed case=number, such as 4K=2.5"),
        ("4K=fast", "not a floor; got '4K=fast'"),
        ("4K=nan", "not a floor; got '4K=nan'"),
        ("", "not a floor; got ''"),
        ("8K=2", "a case that is not measured; got 8K; needed one of 4K, 1M"),
    ],
)
def test_what_is_no_floor_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_floors(text, "host", "ratio", ["4K", "1M"])
