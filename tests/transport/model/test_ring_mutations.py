"""The same model with one rule of the device ring broken: each is found, with a shortest course that leads to it.

The literal numbers of states say how far the search went; each is found among orders without any reduction.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from explore import Course, explore
from ring_model import Ring
from ring_rules import ASIDE, COMPUTE, Protocol, State

KILL = ("kill",)
RULES = Protocol()


def search(
    rules: Protocol, *, messages: int, faults: tuple[str, ...] = (), premise: bool = True,
    through_host: frozenset[int] = frozenset(),
) -> Course[State]:  # fmt: skip
    """With one slot for messages under way and one for lent ones: the least that there is."""
    ring = Ring(1, 1, messages, faults=faults, premise=premise, through_host=through_host, protocol=rules)
    return explore(ring)


def without(step: str) -> tuple[str, ...]:
    return tuple(other for other in RULES.send if other != step)


def swapped(one: str, other: str) -> tuple[str, ...]:
    names = {one: other, other: one}
    return tuple(names.get(step, step) for step in RULES.send)


def missing(step: str) -> Protocol:
    return replace(RULES, send=without(step))


BROKEN: dict[str, tuple[Protocol, int, tuple[str, ...], str, int]] = {
    # what is broken: rules, messages, what may happen, what is found, states until then
    "the send does not wait for the source to be computed": (
        missing("computed"), 1, (), "the copy of message 0 reads message -1 in its source", 4),
    "the send does not wait for the slot's credit": (
        missing("credit"), 2, (), "a reader of message 0 sees message 1 in half 0", 3_579),
    "the send waits for a credit that is one lap old": (
        replace(RULES, late=1), 2, (), "a reader of message 0 sees message 1 in half 0", 3_579),
    "the consumer's stream does not wait for the flag": (
        replace(RULES, awaits=False), 1, (), "a reader of message 0 sees message -1 in half 0", 13),
    "the flag is written before the data": (
        replace(RULES, send=("computed", "credit", "flag", "first half", "second half", "source free")), 1, (),
        "a reader of message 0 sees message -1 in half 0", 72),
    "the flag is written between the halves": (
        replace(RULES, send=swapped("second half", "flag")), 1, (),
        "a reader of message 0 sees message -1 in half 1", 118),
    "the flag is written by the compute stream": (
        replace(RULES, flag_on=COMPUTE), 1, (), "a reader of message 0 sees message -1 in half 0", 105),
    "data and flag arrive in any order": (
        replace(RULES, in_order=False), 1, (), "a reader of message 0 sees message -1 in half 0", 153),
    "flag and credit are 0 or 1": (
        replace(RULES, counts=False), 2, (), "a reader of message 1 sees message 0 in half 0", 4_213),
    "a wait ends at its count only, not above": (
        replace(RULES, compare="EQ"), 1, KILL, "stuck: stream 2 at ('flag?', 0, 1)", 151),
    "the credit is written before the last reader": (
        replace(RULES, give_back=("release", "read", "push")), 2, (),
        "a reader of message 0 sees message 1 in half 0", 8_328),
    "the credit is written by a stream of its own": (
        replace(RULES, credit_on=ASIDE), 2, (), "a reader of message 0 sees message 1 in half 0", 9_134),
    "a slot whose message was copied out is given back without a credit": (
        replace(RULES, copy_out=("push",)), 3, (),
        "premise: the wait for credit 1 of slot 1 is enqueued before it", 199),
    "the source is freed once its copy is enqueued": (
        replace(RULES, producer=(("compute",), ("take", "enqueue"), ("header", "push", "free source")),
                send=without("source free")), 2, (), "the copy of message 0 reads message 1 in its source", 67),
    "the slot is announced before its header is written": (
        replace(RULES, producer=(("compute",), ("take", "enqueue"), ("push",), ("header",))), 1, (),
        "slot 0 announces message -1, not 0", 6),
    "the slot is announced before its copy is enqueued": (
        replace(RULES, producer=(("compute",), ("take",), ("header", "push"), ("enqueue",))), 1, (),
        "premise: the wait for message 0 is enqueued before its flag", 6),
    "the slot is given back before its credit is enqueued": (
        replace(RULES, give_back=("push", "release")), 2, (),
        "premise: the wait for credit 1 of slot 0 is enqueued before it", 61),
    "nobody frees the survivor's streams": (
        replace(RULES, at_abort="never"), 1, KILL, "stuck: stream 2 at ('flag?', 0, 1)", 92),
    "the survivor's streams are freed once": (
        replace(RULES, at_abort="once"), 2, KILL, "stuck: stream 2 at ('flag?', 0, 2)", 7_159),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_rule_is_found(what: str) -> None:
    rules, messages, faults, found, states = BROKEN[what]
    course = search(rules, messages=messages, faults=faults)
    assert course.problem == found, course
    assert course.states == states


def test_a_copy_to_host_memory_that_does_not_wait_for_the_computation_is_found() -> None:
    course = search(replace(RULES, to_host_waits=False), messages=3, through_host=frozenset({1}))
    assert (course.problem, course.states) == ("the host copies message -1 instead of 1", 10)


def test_a_message_through_host_memory_that_counts_in_its_slot_blocks_both_streams_for_ever() -> None:
    """Nobody writes a credit for it."""
    rules, first = replace(RULES, to_host_counts=True), frozenset({0})
    course = search(rules, messages=2, through_host=first)
    assert (course.problem, course.states) == ("premise: the wait for credit 1 of slot 0 is enqueued before it", 13)
    course = search(rules, messages=2, through_host=first, premise=False)
    assert course.problem is not None
    assert course.problem.startswith("stuck: stream 1 at ('credit?', 0, 1), stream 2 at ('flag?', 0, 1)")


def test_a_write_that_arrives_after_the_streams_were_freed_takes_their_freedom_back() -> None:
    """Why once is not enough: message 1's flag arrives late, writes 1 over the freed flag, and message 2's, for which
    a wait is enqueued, was never sent."""
    names = [str(name) for name in search(replace(RULES, at_abort="once"), messages=2, faults=KILL).trace]
    freed = names.index("('frees its streams', 1)")
    assert any(name.startswith("('arrives', 'flag'") for name in names[freed:])


def test_a_slot_given_back_before_its_credit_is_enqueued_blocks_both_streams_for_ever() -> None:
    """The theorem's premise is not for its own sake: the credit lands behind the wait for the slot's next message."""
    course = search(replace(RULES, give_back=("push", "release")), messages=2, premise=False)
    assert course.problem is not None
    assert course.problem.startswith("stuck: stream 1 at ('credit?', 0, 1), stream 2 at ('flag?', 0, 2)")


@pytest.mark.long
def test_a_copied_out_slot_without_a_credit_blocks_both_streams_for_ever() -> None:
    course = search(replace(RULES, copy_out=("push",)), messages=3, premise=False)
    assert course.problem is not None
    assert course.problem.startswith("stuck: stream 1 at ('credit?', 1, 1), stream 2 at ('flag?', 1, 2)")


@pytest.mark.parametrize(("messages", "faults"), [(1, ("kill", "fail")), (2, KILL)])
def test_an_early_announcement_alone_does_no_harm(messages: int, faults: tuple[str, ...]) -> None:
    """Where every stream has a queue of its own: the same thread enqueues the copy next and waits for nobody before.
    Where processes share a queue it blocks them for ever (``test_hardware_queues.py``)."""
    rules = replace(RULES, producer=(("compute",), ("take",), ("header", "push"), ("enqueue",)))
    assert search(rules, messages=messages, faults=faults, premise=False).problem is None


@pytest.mark.parametrize("messages", [1, 2])
def test_a_wait_for_exactly_its_count_does_no_harm_while_all_live(messages: int) -> None:
    """A slot's flag stays until the message is given back, its credit until the next one is sent: no count is skipped.
    Only the abort rule writes a value above."""
    assert search(replace(RULES, compare="EQ"), messages=messages).problem is None
