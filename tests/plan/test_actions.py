"""The text form of single actions: torch's, read strictly."""

from __future__ import annotations

import pytest

from pipex.errors import PlanSyntaxError
from pipex.plan.actions import NONE, Action, Kind, parse_action
from pipex.plan.interop.torch_versions import WAITED_BY

TEXTS = {
    "2F0": Action(2, Kind.F, 0),
    "0I11": Action(0, Kind.I, 11),
    "10W3": Action(10, Kind.W, 3),
    "0B0": Action(0, Kind.B, 0),
    "3SEND_F1": Action(3, Kind.SEND_F, 1),
    "4RECV_F1": Action(4, Kind.RECV_F, 1),
    "4SEND_B1": Action(4, Kind.SEND_B, 1),
    "3RECV_B1": Action(3, Kind.RECV_B, 1),
    "3WAIT_SEND_F1": Action(3, Kind.WAIT_SEND_F, 1),
    "4WAIT_SEND_B1": Action(4, Kind.WAIT_SEND_B, 1),
    "1UNSHARD": Action(1, Kind.UNSHARD),
    "1RESHARD": Action(1, Kind.RESHARD),
    "1REDUCE_GRAD": Action(1, Kind.REDUCE_GRAD),
    "1WAIT_REDUCE_GRAD": Action(1, Kind.WAIT_REDUCE_GRAD),
    "0UPDATE3": Action(0, Kind.UPDATE, 3),
    "(0F1;7B0)OVERLAP_F_B": Action(NONE, Kind.OVERLAP_F_B, NONE, (Action(0, Kind.F, 1), Action(7, Kind.B, 0))),
}


@pytest.mark.parametrize(("text", "action"), TEXTS.items())
def test_text_and_action_stand_for_each_other(text: str, action: Action) -> None:
    assert parse_action(text) == action
    assert str(action) == text


def test_torch_reads_and_writes_the_same_texts() -> None:
    from torch.distributed.pipelining.schedules import _Action, _ComputationType

    known = {kind.value for kind in _ComputationType}
    ours_alone = {kind.value for kind in Kind} - known - {kind.value for kind in WAITED_BY}  # torch 2.15 has the waits
    assert ours_alone == {"UPDATE"}
    for text, ours in TEXTS.items():
        if ours.kind.value in known:
            theirs = _Action.from_str(text)
            assert theirs is not None
            assert str(theirs) == text
            assert theirs.stage_index == ours.stage
            assert theirs.computation_type.value == ours.kind.value
            assert theirs.microbatch_index == (None if ours.microbatch == NONE else ours.microbatch)


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("", 1),
        (" 1F2", 1),
        ("-1F0", 1),
        ("F0", 1),
        ("0", 2),
        ("0Q1", 2),
        ("0f1", 2),
        ("01F0", 2),
        ("0OVERLAP_F_B1", 2),
        ("1234567890F0", 10),
        ("0B", 3),
        ("0SEND_F", 8),
        ("0F-1", 3),
        ("0UNSHARD3", 9),
        ("0WAIT_SEND_F", 13),
        ("0UPDATE", 8),
        ("0WAIT_REDUCE_GRAD3", 18),
        ("0F0junk", 4),
        ("0F00", 4),
        ("0F0 ", 4),
        ("0F0\n", 4),
        ("0F٣", 3),
        ("(0F1;7B0)", 1),
        ("(0F1;7B0)OVERLAP_F_Bx", 1),
        ("(0F1)OVERLAP_F_B", 1),
        ("()OVERLAP_F_B", 2),
        ("(0F1; 7B0)OVERLAP_F_B", 6),
        ("(0F1;7B0x)OVERLAP_F_B", 9),
        ("(0F1;7SEND_B0)OVERLAP_F_B", 6),
        ("(0F1;0UPDATE0)OVERLAP_F_B", 6),
        ("((0F1;7B0)OVERLAP_F_B;0F1)OVERLAP_F_B", 2),
    ],
)
def test_text_that_is_no_action_is_refused_at_its_first_wrong_character(text: str, column: int) -> None:
    with pytest.raises(PlanSyntaxError, match=rf"line 1, column {column};"):
        parse_action(text)


@pytest.mark.parametrize("text", ["2F0", "0WAIT_SEND_B12", "3RESHARD", "(0F1;7B0)OVERLAP_F_B"])
def test_no_small_change_of_a_text_is_read_as_something_that_is_written_differently(text: str) -> None:
    letters = "019FIWBS_D();,- \n"
    changed = {text[:i] + letter + text[j:] for i in range(len(text) + 1) for j in (i, i + 1) for letter in letters}
    changed |= {text[:i] + text[i + 1 :] for i in range(len(text))}
    read = 0
    for candidate in changed:
        try:
            action = parse_action(candidate)
        except PlanSyntaxError:
            continue
        read += 1
        assert str(action) == candidate
    assert 0 < read < len(changed)


def test_an_error_counts_from_the_place_that_it_was_given() -> None:
    with pytest.raises(PlanSyntaxError, match="line 7, column 22;"):
        parse_action("0Fx", line=7, column=20)


def test_actions_are_equal_and_hash_by_value() -> None:
    assert {Action(1, Kind.F, 2): "a"}[Action(1, Kind.F, 2)] == "a"
    assert len({Action(1, Kind.F, 2), Action(1, Kind.B, 2), Action(2, Kind.F, 2), Action(1, Kind.F, 1)}) == 4
