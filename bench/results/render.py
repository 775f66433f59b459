"""Writes the README's table of figures from the measured results beside this file: ``python bench/results/render.py``.

Each ``<bench>.json`` is the last line of ``pipex bench <bench> --json``, as it was measured; a bench without one has no
rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
BEGIN, END = "<!-- figures: written by bench/results/render.py -->\n", "<!-- end of figures -->\n"

# bench -> (what a row says, provider, figure, unit, figure of the comparison, what it compares with)
COLUMNS = {
    "p2p": ("message of {case} between two processes", "host", "p50_us", "µs", "ratio", "Gloo ÷ pipex"),
    "step": ("what an action costs beside its work, {case}", "pipex", "net_us_per_action", "µs", "net_ratio",
             "torch.distributed.pipelining ÷ pipex"),
    "overlap": ("step, {case} ({exposed_share:.1%} of its actions' time is messages that nothing hides)", "pipex",
                "p50_us", "µs", "ratio", "torch.distributed.pipelining ÷ pipex"),
    "drop-in": ("step under `pipex.drop_in()`, {case} ranks", "pipex", "p50_us", "µs", "ratio", "without ÷ with it"),
    "pairs": ("step with fused pairs, layers {case} (a pair takes {overlap:.2f} of what its parts take)", "pipex",
              "p50_us", "µs", "ratio", "one part after the other ÷ both at once"),
    "backward": ("split backward, {case} ({over_whole:.2f} × a whole one; forward {forward_us:,.0f} µs)", "pipex",
                 "p50_us", "µs", "ratio", "torch's split ÷ pipex"),
}  # fmt: skip


def table() -> str:
    """The table in Markdown, and what it was measured on."""
    lines = ["| | pipex | compared with | |", "|---|---|---|---|"]
    machines: dict[str, list[str]] = {}
    for bench, (text, provider, figure, unit, comparison, peer) in COLUMNS.items():
        path = HERE / f"{bench}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        machine: dict[str, Any] = result["environment"]
        where = f"{machine['cores_allowed']} cores ({machine['cpu']}), torch {machine['torch']}, {machine['date'][:10]}"
        machines.setdefault(where, []).append(f"`{bench}`")
        for row in result["rows"]:
            if row["provider"] == provider:
                value = f"{row[figure]:,.1f} {unit}" if row[figure] < 100 else f"{row[figure]:,.0f} {unit}"
                ratio = "" if row[comparison] is None else f"{row[comparison]:.2g} ×"  # too small a figure to tell
                lines.append(f"| {text.format(**row)} | {value} | {peer} | {ratio} |")
    places = "; ".join(f"{', '.join(benches)} on {where}" for where, benches in machines.items())
    lines += [
        "",
        f"Medians, one thread a rank; {places}. torch has no zb-h1; beside it stands its 1F1B. The JSON lines are in "
        "[bench/results](bench/results).",
    ]
    return "\n".join(lines) + "\n"


def updated(readme: str) -> str:
    """The README with the table as it must be."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + table() + "\n" + END + after


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
