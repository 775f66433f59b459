"""Whatever stands in a file or an argument: it is read, or refused with a parse error, and never takes long."""

from __future__ import annotations

import csv
import dataclasses
import io
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import SEED

from pipex.errors import PlanError, PlanSyntaxError
from pipex.plan import Placement, Plan, build, parse_action, validate
from pipex.plan.interop import Layout, from_torch_csv, read_plan, to_torch_csv
from pipex.plan.interop.sidecar import sidecar_text
from pipex.plan.interop.torch_csv import parse_rows, rows_text

HEADER = "# pipex plan 1: family=a placement=loop ranks=1 chunks=1 microbatches=1 update=step peak_activations=1\n"
DUALPIPEV = "0F0,0F1,3F0,3I0,3W0,3F1,3B1,0B0,0B1\r\n1F0,2F0,1F1,2B0,(2F1;1B0)OVERLAP_F_B,2B1,1B1\r\n"
INTERLEAVED = build("interleaved", 2, 4, chunks=2)


def read_plan_text(data: bytes) -> None:
    for text in (data, data.decode("utf-8", "surrogateescape")):
        plan = Plan.from_text(text)
        assert plan.to_text() == (text if isinstance(text, str) else text.decode())
    validate(plan)


def read_csv(data: bytes) -> None:
    rows = parse_rows(data)
    assert parse_rows(rows_text(rows)) == rows
    # What Python's reader, and so torch, makes of it: the same cells, then perhaps rows without any.
    theirs = [
        [cell.strip(" \t") for cell in row] for row in csv.reader(io.StringIO(data.decode("latin-1"), newline=""))
    ]
    assert [["" if cell is None else str(cell) for cell in row] for row in rows] == theirs[: len(rows)]
    assert not any(map(any, theirs[len(rows) :]))
    validate(from_torch_csv(data))


def read_csv_with_sidecar(data: bytes) -> None:
    csv, _, metadata = data.partition(b"{")
    plan = from_torch_csv(csv, b"{" + metadata)
    assert from_torch_csv(csv, sidecar_text(plan)) == plan
    validate(plan)


def read_action(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    assert str(parse_action(text)) == text


def read_layout(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    layout = Layout.from_text(text, 1 + ("*" in text))
    assert Layout.from_text(layout.to_text(), layout.ranks) == layout


READERS: dict[Callable[[bytes], None], list[str]] = {
    read_plan_text: [plan.to_text() for plan in (build("1f1b", 2, 2), build("zb-h1", 3, 3), INTERLEAVED)],
    read_csv: [
        to_torch_csv(INTERLEAVED),
        to_torch_csv(INTERLEAVED, "compute_comms", "2.14").replace("\r", ""),
        to_torch_csv(INTERLEAVED, "compute_comms", "2.15"),
        DUALPIPEV,
    ],
    read_csv_with_sidecar: [to_torch_csv(plan) + sidecar_text(plan) for plan in (build("1f1b", 2, 2), INTERLEAVED)],
    read_action: ["2F0", "0WAIT_SEND_B12", "3RESHARD", "(0F1;7B0)OVERLAP_F_B"],
    read_layout: ["Et*3|(tt|)*29,m|L", "EtL", "E||t*2(|t)*3L"],
}
WORDS = """
    0 -1 999999999 99999999999 1e999 , ; | * *999999999 ( ) { } " # F I W B 0F0 0SEND_F0 1RECV_B0 0UNSHARD
    0WAIT_SEND_F0 )OVERLAP_F_B
    v wave bidirectional never true null NaN ranks=999999999 chunks=999999999 microbatches=999999999
    "chunks":999999999999,
"""
SPICE = [word.encode() for word in WORDS.split()]
SPICE += [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    "\u0663".encode(),
    b"\r",
    b"\n",
    b"\r\n",
    b" ",
    b"\t",
    b'"0F0"',
    b' "0F0" ',
    b"9" * 5000,
    b"[" * 3000,
]


def mutated(rng: random.Random, seeds: list[str]) -> bytes:
    """A few random changes of a good text; sometimes random bytes."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.randint(0, 40))
    data = bytearray(rng.choice(seeds).encode())
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 8))):
        begin = rng.randint(0, len(data))
        end = min(len(data), begin + rng.choice((0, 1, 1, 2, 5, 40)))
        piece = bytes(data[begin:end])
        match rng.randrange(6):
            case 0:
                data[begin:end] = b""
            case 1:
                data[begin:end] = rng.choice(SPICE)
            case 2:
                data[begin:begin] = rng.choice(SPICE)
            case 3:
                data[begin:begin] = piece * rng.choice((1, 1, 2, 50))
            case 4:
                data[begin:end] = b""
                at = rng.randint(0, len(data))
                data[at:at] = piece
            case 5:
                other = rng.choice(seeds).encode()
                data[begin:end] = other[begin : begin + rng.randint(0, 40)]
    return bytes(data)


def fuzz(read: Callable[[bytes], None], seed: int) -> bool:
    """Whether the input was read."""
    data = mutated(random.Random(f"{read.__name__} {seed}"), READERS[read])
    try:
        read(data)
    except PlanError:
        return False
    except Exception as error:
        raise AssertionError(f"seed {seed} raises {type(error).__name__}: {data!r}") from error
    return True


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_inputs_out_of_thin_air_are_read_or_refused(read: Callable[[bytes], None]) -> None:
    for good in READERS[read]:
        read(good.encode())
    accepted = sum(fuzz(read, seed) for seed in range(1500))
    assert 50 < accepted < 1450


@pytest.mark.long
@pytest.mark.parametrize("seconds", [10, pytest.param(60, marks=pytest.mark.nightly)])
def test_new_inputs_are_read_or_refused(seconds: float) -> None:
    seed, end = 1500 + SEED * 100_000, time.monotonic() + seconds
    while time.monotonic() < end:
        for read in READERS:
            fuzz(read, seed)
        seed += 1


@pytest.mark.parametrize(
    "cell",
    ["0F0junk", " 1F2 ", "-1F0", "99999999999F1", "0Z0", "0F0\0", "\0", "\ufeff0F0", "", "0B", "0F0\x1a", "0F\u0660"],
)
def test_a_bad_action_is_refused_wherever_it_stands(cell: str) -> None:
    with pytest.raises(PlanSyntaxError, match="line 1, column"):
        parse_action(cell)
    for text in (f"0F0,{cell},0B0", f"{cell},0B0", f"0F0,{cell}"):
        with pytest.raises(PlanSyntaxError, match="line 2, column"):
            Plan.from_text(HEADER + text + "\n")
        if cell not in ("", " 1F2 "):  # to torch an idle step, and an action with blanks around it
            with pytest.raises(PlanSyntaxError, match="line 1, column"):
                from_torch_csv(text + "\r\n")
            with pytest.raises(PlanSyntaxError, match="line 1, column"):
                from_torch_csv(f"{text}\r\n".encode())


GOOD = HEADER + "0F0,0B0\n"


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"", "line 1, column 1;"),
        (b"\xef\xbb\xbf" + GOOD.encode(), "line 1, column 1;"),
        ("\ufeff" + GOOD, "line 1, column 1;"),
        (GOOD.encode("utf-16"), "line 1, column 1;"),
        (GOOD.replace("family=a", "family=\0").encode(), "line 1, column 1;"),
        (GOOD.encode().replace(b"0B0", b"0B\xff"), "line 2, column 7;"),
        (GOOD.encode().replace(b"0B0", b"0B0\xc3\xa9"), "line 2, column 8;"),
        (GOOD.replace("\n", "\r\n"), "line 1, column 1;"),
        (HEADER + "0F0,0B0\r\n", "line 2, column 8;"),
        (HEADER + "0F0\0,0B0\n", "line 2, column 4;"),
    ],
)
def test_bytes_that_are_no_plan_are_refused_at_their_place(data: str | bytes, place: str) -> None:
    Plan.from_text(GOOD.encode())
    with pytest.raises(PlanSyntaxError, match=place):
        Plan.from_text(data)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", [bytes(1 << 30), HEADER + "0F0," * 10**7, "0F0," * 10**7], ids=["1 GB", "plan", "csv"])
def test_a_text_longer_than_any_plan_is_refused_unread(text: str | bytes) -> None:
    for read in (Plan.from_text, from_torch_csv):
        with pytest.raises(PlanSyntaxError, match=f"the plan is too long; got {len(text)} characters; needed 16777216"):
            read(text)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["plan", "plan.csv", "plan.csv.json"])
def test_a_file_longer_than_any_plan_is_refused_unread(name: str, tmp_path: Path) -> None:
    (tmp_path / "plan.csv").write_text("0F0,0B0\n")
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(
        PlanSyntaxError, match=r"(the plan is too long|cannot read the sidecar); got 16777217 characters"
    ):
        read_plan(tmp_path / name.removesuffix(".json"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("chunks=1", "chunks=999999999", "the plan has more stages than actions; got 999999999 stages in"),
        ("ranks=1", "ranks=999999999", "wrong number of orders; got 1; needed 999999999"),
        ("microbatches=1", "microbatches=999999999", "rank 0 never runs 0F1"),
        ("0F0", "999999999F0", "names a stage that is not there"),
        ("0F0", "0F999999999", "names a micro-batch that is not there"),
    ],
)
def test_huge_numbers_are_refused_at_once(old: str, new: str, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        validate(Plan.from_text(GOOD.replace(old, new)))


@pytest.mark.timeout(20)
def test_huge_numbers_in_a_csv_or_its_sidecar_are_refused_at_once() -> None:
    huge = dataclasses.replace(build("naive", 1, 1), placement=Placement("loop", 1, 10**12))
    with pytest.raises(
        PlanError, match="the plan has more stages than actions; got 1000000000000 stages in 9 characters"
    ):
        from_torch_csv("0F0,0B0\r\n", sidecar_text(huge))
    for text in ("999999999F0\n", "0F0,0F999999999\n", "0F0,999999999UNSHARD\n", "0F0,0SEND_F999999999\n"):
        with pytest.raises(PlanError):
            validate(from_torch_csv(text))
