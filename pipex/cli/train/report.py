"""The numbers of a run: one JSON object, and the same as text."""

from __future__ import annotations

import os
from statistics import median, quantiles
from typing import Any

import pipex.plan as plans
from pipex.cli.train.job import Outcome
from pipex.cli.train.options import Options
from pipex.observe import Figures
from pipex.plan import Plan
from pipex.plan.measured import measured_costs


def numbers(
    options: Options, plan: Plan, outcome: Outcome, figures: Figures, different: list[str] | None
) -> dict[str, Any]:
    """The report's numbers. Times are medians over the observed steps.

    Args:
        different: what ``--check`` found to differ; None without it.
    """
    predicted = _predicted(plan, figures)
    result = {
        "schedule": plan.family,
        "ranks": plan.placement.ranks,
        "chunks": plan.placement.chunks,
        "microbatches": plan.microbatches,
        "steps": len(outcome.losses),
        "loss_first": outcome.losses[0],
        "loss_last": outcome.losses[-1],
        "tokens_per_second": options.batch * options.context / median(outcome.seconds),
        "oversubscribed": plan.placement.ranks > len(os.sched_getaffinity(0)),
        "bubble_makespan_measured": figures.bubble_makespan,
        "bubble_makespan_predicted": predicted.bubble_makespan,
        "step_ms_measured": 1e3 * (figures.makespan + figures.after_actions),
        "step_ms_predicted": 1e3 * (predicted.makespan + figures.after_actions),
        "stage_step_ms": [1e3 * seconds for seconds in figures.stage.values()],
        "p2p_us_p50": _percentile(figures.messages, 50),
        "p2p_us_p99": _percentile(figures.messages, 99),
        "peak_activations": outcome.peaks,
        "pairs": [pairs._asdict() for pairs in outcome.pairs],
    }
    if different is not None:
        result["identical"] = not different
    return result


def text(result: dict[str, Any], figures: Figures, different: list[str] | None) -> str:
    """The same for people, and where the time went."""
    ranks = result["ranks"]
    lines = [
        f"{result['schedule']}, {ranks} ranks, {result['microbatches']} micro-batches, {result['steps']} steps",
        f"loss              {result['loss_first']:.3f} → {result['loss_last']:.3f}",
        f"speed             {result['tokens_per_second']:,.0f} tokens/s",
        f"step              measured {result['step_ms_measured']:.1f} ms, "
        f"predicted from the stage times {result['step_ms_predicted']:.1f} ms",
        f"makespan bubble   measured {result['bubble_makespan_measured']:.1%}, "
        f"predicted from the stage times {result['bubble_makespan_predicted']:.1%}",
    ]
    if result["oversubscribed"]:
        lines.append(f"{'':18}{ranks} ranks share {len(os.sched_getaffinity(0))} cores, so the bubbles say little here")
    if result["p2p_us_p50"] is not None:
        lines.append(
            f"message           {result['p2p_us_p50']:.0f} µs in the median, "
            f"{result['p2p_us_p99']:.0f} µs at the 99th percentile"
        )
    held = ", ".join(f"{peak / result['chunks']:g}" for peak in result["peak_activations"])
    lines.append(f"activations held  {held} micro-batches at most, per rank")
    if any(pairs["all"] for pairs in result["pairs"]):
        ran = ", ".join(f"{pairs['at_once']} of {pairs['all']}" for pairs in result["pairs"])
        why = next((f"; {pairs['why']}" for pairs in result["pairs"] if pairs["why"]), "")
        lines.append(f"pairs at once      {ran}, per rank{why}")
    if different is not None:
        lines.append(
            "one process       identical, bit for bit" if not different
            else f"one process       DIFFERENT in {len(different)} places: {', '.join(different[:5])}"
        )  # fmt: skip
    lines += ["", "where a step's time went, per rank", *_table(figures)]
    return "\n".join(lines)


def _table(figures: Figures) -> list[str]:
    order = ["F", "I", "W", "B", "sending", "waiting", "reduce", "optimizer", "other"]
    columns = [what for what in order if any(what in shares for shares in figures.shares)]
    rows = ["rank  " + "".join(f"{what:>11}" for what in columns)]
    for rank, shares in enumerate(figures.shares):
        rows.append(f"{rank:4d}  " + "".join(f"{shares.get(what, 0):>11.1%}" for what in columns))
    return rows


def _predicted(plan: Plan, figures: Figures) -> plans.Simulation:
    """The plan's course with the measured median times of its actions."""
    hop = median(figures.messages) if figures.messages else 0.0
    return plans.simulate(plan, measured_costs(plan, figures.action, hop, figures.overlap))


def _percentile(seconds: list[float], percent: int) -> float | None:
    """In microseconds; None where there was no message."""
    if not seconds:
        return None
    return 1e6 * (quantiles(seconds, n=100, method="inclusive")[percent - 1] if len(seconds) > 1 else seconds[0])
