"""Both lengths of a step, and the bubble under both meanings."""

from __future__ import annotations

from pipex.plan.bubbles import Bubbles, bubbles, busy_times


def test_both_bubbles_of_a_step() -> None:
    #   rank 0   ██····██        4 of 8, and of the step's 10
    #   rank 1     ██·█████      7 of 8
    assert bubbles([[(5, 7), (11, 13)], [(7, 9), (10, 15)]]) == Bubbles(
        makespan=10, span=8, bubble_span=0.5, bubble_makespan=1 - 11 / 20
    )


def test_a_rank_may_wait_at_its_end() -> None:
    assert bubbles([[(5, 7), (11, 13)], [(7, 9), (10, 15)]], ends=[16, 16]) == Bubbles(
        makespan=11, span=11, bubble_span=1 - 4 / 11, bubble_makespan=1 - 11 / 22
    )


def test_a_step_without_length_has_no_bubble() -> None:
    assert bubbles([[(3, 3)], [(3, 3)]]) == Bubbles(0, 0, 0, 0)


def test_what_runs_at_once_is_one_time() -> None:
    assert busy_times([(0, 2), (2, 3), (4, 9), (5, 6), (8, 10)]) == [(0, 2), (2, 3), (4, 10)]
    assert busy_times([(5, 9), (3, 6)]) == [(3, 9)]  # the second part of a pair began first
