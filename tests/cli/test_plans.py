"""The commands about plans, as a person runs them, and what they say to bad input."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import SEED, case
from mutated import mutate

from pipex.cli import main
from pipex.observe import Event, write_trace
from pipex.plan import FAMILIES, Costs, Plan, build, simulate
from pipex.plan.layer_costs import Layer, LayerCosts

KEYS = {
    "family", "chunks", "makespan", "span", "bubble_makespan", "bubble_span", "bound_makespan", "peak_memory", "limit",
    "over_limit", "seconds", "plan_file", "recomputation", "lost", "activations",
}  # fmt: skip


@pytest.fixture
def pipex(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str, code: int = 0) -> str:
        assert main(arguments) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return run


def last_line(text: str) -> dict[str, Any]:
    found = json.loads(text.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_the_table_of_families_has_every_fact_of_every_family(pipex: Any) -> None:
    rows = last_line(pipex("schedules", "--json"))["schedules"]
    assert [row["family"] for row in rows] == list(FAMILIES)
    for row in rows:
        assert all(row.values()), row
    text = pipex("schedules", "1f1b", "interleaved")
    assert "PipeDream-Flush (arXiv 2006.09503)" in text
    assert "group" in text
    assert "zb-h1:" not in text


def test_all_families_side_by_side_with_the_published_fractions(pipex: Any) -> None:
    """The scoreboard at F = I = W = 1, no hop, 8 ranks, 32 micro-batches."""
    rows = last_line(pipex("bubble", "-p", "8", "-m", "32", "-v", "2", "--json"))["rows"]
    assert [row["family"] for row in rows] == list(FAMILIES)
    found = {r["family"]: (f"{r['bubble_makespan']:.4f}", f"{r['bubble_span']:.4f}") for r in rows if "reason" not in r}
    assert found["gpipe"] == found["1f1b"] == ("0.1795", "0.1795")
    assert found["interleaved"] == ("0.0986", "0.0986")
    assert found["zb-h1"] == ("0.0680", "0.0680")
    assert found["zb-h2"] == ("0.0680", "0.0000")
    text = pipex("bubble", "-p", "8", "-m", "32", "-v", "2")
    assert "(P-1)/(M+P-1) = 17.9% of the step, or (P-1)/M = 21.9% of the ideal time" in text
    assert "(P-1)/(VM+P-1) = 9.9% of the step, or (P-1)/(VM) = 10.9% of the ideal time" in text


def test_a_family_that_does_not_fit_says_why(pipex: Any) -> None:
    rows = last_line(pipex("bubble", "-p", "3", "-m", "4", "--json"))["rows"]
    reasons = {row["family"]: row["reason"] for row in rows if "reason" in row}
    assert "needed" in reasons["dualpipe"]
    assert "dualpipe" in pipex("bubble", "-p", "3", "-m", "4")


def test_a_schedule_is_drawn_and_written(pipex: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.plan"
    found = last_line(pipex("schedule", "zb-h1", "-p", "4", "-m", "8", "--out", str(file), "--json"))
    assert found.keys() == KEYS
    assert (found["family"], found["chunks"], found["makespan"], found["limit"]) == ("zb-h1", 1, 27, None)
    assert found["plan_file"] == str(file)
    assert Plan.from_text(file.read_text()) == build("zb-h1", 4, 8)
    text = pipex("schedule", "1f1b", "-p", "2", "-m", "2", "--f", "1", "--i", "1,1", "--w", "1,2")
    assert text.splitlines()[0].startswith("rank 0 |F0")
    assert "no schedule of this placement and memory is shorter than" in text


def test_a_family_option_is_set(pipex: Any, tmp_path: Path) -> None:
    def chunks_and_peak(*options: str) -> list[float]:
        found = last_line(pipex("schedule", "1f1b", "-p", "4", "-m", "8", *options, "--json"))
        peaks: list[float] = found["peak_memory"]
        return peaks

    assert chunks_and_peak() == [4, 3, 2, 1]
    assert chunks_and_peak("--set", "warmup=3") == [7, 5, 3, 1]


@pytest.mark.parametrize("name", ["a.plan", "a.csv"])
def test_a_written_plan_is_viewed(pipex: Any, tmp_path: Path, name: str) -> None:
    file = str(tmp_path / name)
    costs = ("--f", "2", "--hop", "0.5")
    said = last_line(pipex("schedule", "interleaved", "-p", "2", "-m", "4", "-v", "2", *costs, "--out", file, "--json"))
    found = last_line(pipex("view", file, *costs, "--json"))
    assert {**found, "seconds": 0} == {**said, "seconds": 0}
    page, chrome = tmp_path / "page.html", tmp_path / "chrome.json"
    assert pipex("view", file, "--html", str(page), "--chrome", str(chrome)).startswith("rank 0 |")
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert json.loads(chrome.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule", "2f2b", "-p", "2", "-m", "2"], "unknown schedule; got '2f2b'; needed one of naive, gpipe"),
        (["schedules", "2f2b"], "unknown schedule; got '2f2b'"),
        (["schedule", "1f1b", "-p", "0", "-m", "2"], "--ranks is out of range; got 0; needed at least 1"),
        (["bubble", "-p", "2", "-m", "-3"], "--microbatches is out of range; got -3"),
        (["bubble", "-p", "2", "-m", "3", "-v", "0"], "--chunks is out of range; got 0"),
        (["schedule", "1f1b", "-p", "2", "-m", "2", "-v", "3"], "wrong number of chunks per rank for 1f1b; got 3"),
        (["schedule", "1f1b", "-p", "2", "-m", "2", "--f", "-1"], "bad cost: forward, number 0; got -1.0"),
        (["schedule", "1f1b", "-p", "2", "-m", "2", "--w", "nan"], "bad cost: weight_gradient, number 0; got nan"),
        (["schedule", "1f1b", "-p", "2", "-m", "2", "--i", "1,2,3"], "wrong number of costs input_gradient; got 3"),
        (["schedule", "1f1b", "-p", "2", "-m", "2", "--hop", "-1"], "bad cost: hop; got -1.0"),
        (
            ["schedule", "1f1b", "-p", "4", "-m", "8", "--memory", "3"],
            "needs more memory on rank 0 than --memory",
        ),
        (["schedule", "1f1b", "-p", "4", "-m", "8", "--memory", "0"], "bad --memory of rank 0; got 0.0"),
        (["schedule", "1f1b", "-p", "4", "-m", "8", "--memory", "4,4"], "wrong number of limits in --memory; got 2"),
        (["schedule", "1f1b", "-p", "2", "-m", "2", "--set", "warmup"], "cannot read --set; got 'warmup'"),
        (
            ["schedule", "1f1b", "-p", "2", "-m", "2", "--set", "group=2"],
            "1f1b has no option group; needed one of war",
        ),
        (["schedule", "1f1b", "-p", "2", "-m", "2", "--set", "warmup=x"], "bad option warmup; got 'x'; needed a whole"),
        (["schedule", "zbv", "-p", "2", "-m", "2", "--set", "costs=3"], "cannot --set costs; give -p, -m, -v, --f"),
        (["schedule", "interleaved", "-p", "2", "-m", "2", "--set", "ranks=3"], "cannot --set ranks; give -p"),
        (["schedule", "gpipe", "-p", "1000", "-m", "1000"], "the plan is too large"),
        (["schedule", "gpipe", "-p", "1000000", "-m", "1000000"], "the plan is too large; got 1000000 micro-batches"),
        (["schedule", "gpipe", "-p", "9" * 20, "-m", "1"], "the plan is too large"),
        (["view", "/nowhere/a.plan"], "cannot read /nowhere/a.plan; got No such file"),
        (
            ["schedule", "1f1b", "-p", "2", "-m", "2", "--out", "/nowhere/a"],
            "cannot write /nowhere/a; got No such",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(pipex: Any, arguments: list[str], message: str) -> None:
    said = pipex(*arguments, code=1)
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_csv_beside_the_sidecar_of_another_plan_is_refused(pipex: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    pipex("schedule", "1f1b", "-p", "2", "-m", "4", "--out", str(file))
    sidecar = (tmp_path / "a.csv.json").read_text()
    pipex("schedule", "gpipe", "-p", "2", "-m", "4", "--out", str(file))
    (tmp_path / "a.csv.json").write_text(sidecar)
    assert "digest" in pipex("view", str(file), code=1)


def test_planning_on_the_command_line_needs_no_torch() -> None:
    code = (
        "import sys; from pipex.cli import main; "
        "main(['schedule', 'zb-h1', '-p', '2', '-m', '3']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_search_keeps_the_memory_and_says_how_far_it_is_from_the_bound(pipex: Any, tmp_path: Path) -> None:
    file = tmp_path / "best.plan"
    sizes = ("plan", "-p", "4", "-m", "8", "--f", "100", "--i", "100", "--w", "65", "--hop", "2", "--evaluations", "60")
    found = last_line(pipex(*sizes, "--out", str(file), "--json"))
    assert found.keys() >= KEYS | {"distance", "runners_up", "evaluations", "capped"}
    assert found["limit"] == [4, 4, 4, 4]  # what 1f1b holds
    assert max(found["peak_memory"]) <= 4
    assert found["bound_makespan"] <= found["makespan"]
    assert found["distance"] == pytest.approx(found["makespan"] / found["bound_makespan"] - 1)
    assert all(found["makespan"] <= other["makespan"] for other in found["runners_up"])
    again = last_line(pipex("view", str(file), "--f", "100", "--i", "100", "--w", "65", "--hop", "2", "--json"))
    assert again["makespan"] == found["makespan"]
    text = pipex(*sizes, "--families", "zb-h1", "--max-chunks", "1")
    assert "zb-h1 with 1 chunks per rank (published)" in text
    assert "above the bound on the makespan" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--families", "2f2b"], "unknown schedule; got '2f2b'"),
        (["--max-chunks", "0"], "--max-chunks is out of range; got 0; needed at least 1"),
        (["--seconds", "nan"], "--seconds is out of range; got nan"),
        (["--max-chunks", "999999999"], "the plan is too large; got 8 micro-batches on 4 ranks with 999999999 chunks"),
        (["--f", "1e308"], "bad cost: forward, number 0; got 1e+308"),
        (["--evaluations", "0"], "too few evaluations; got 0; needed at least 1"),
        (["--memory", "0.5", "--spare", "none"], "memory limit of rank 0; got 0.5; needed at least 1, what one"),
        (["--memory", "0.3"], "memory limit of rank 0; got 0.3; needed at least 0.338235, what one"),
        (["--memory", "0.2", "--offload", "1"], "memory limit of rank 0; got 0.2; needed at least 0.25, what one"),
        (["--memory", "2", "--spare", "offload"], "the costs do not say what it takes to offload"),
        (["--offload", "-1"], "bad cost: offload, number 0; got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_search_that_cannot_be_made_says_why(pipex: Any, arguments: list[str], message: str) -> None:
    said = pipex("plan", "-p", "4", "-m", "8", *arguments, code=1)
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_search_says_what_becomes_of_the_activations_of_every_stage(pipex: Any, tmp_path: Path) -> None:
    file = tmp_path / "best.plan"
    sizes = ("plan", "-p", "4", "-m", "8", "--memory", "1", "--max-chunks", "2", "--evaluations", "300")
    found = last_line(pipex(*sizes, "--out", str(file), "--json"))
    plan = Plan.from_text(file.read_text())
    assert plan.recomputed
    assert found["activations"] == ["recomputed" if stage in plan.recomputed else "held" for stage in range(8)]
    assert 0 < found["recomputation"] == pytest.approx(found["lost"] - found["bubble_makespan"])
    assert found["lost"] == pytest.approx(1 - 8 * 3 / found["makespan"])
    assert any(other["recomputed"] for other in found["runners_up"])
    assert not any(other["offloaded"] for other in found["runners_up"])
    assert last_line(pipex("view", str(file), "--json"))["makespan"] == found["makespan"]
    longer = last_line(pipex("view", str(file), "--recompute", "2", "--json"))
    assert longer["makespan"] > found["makespan"]
    text = pipex(*sizes)
    assert "stages recomputed), the best of" in text
    assert "recomputed between F and I: stages " in text
    assert f"bubble and recomputation: {found['lost']:.2%} of the makespan is no useful F, I or W" in text

    found = last_line(pipex(*sizes, "--offload", "0.1", "--spare", "offload", "--out", str(file), "--json"))
    plan = Plan.from_text(file.read_text())
    assert plan.offloaded
    assert found["activations"] == ["offloaded" if stage in plan.offloaded else "held" for stage in range(8)]
    assert (found["recomputation"], found["lost"]) == (0, found["bubble_makespan"])
    slower = last_line(pipex("view", str(file), "--offload", "2", "--json"))
    assert slower["makespan"] > found["makespan"]
    assert "offloaded between F and I: stages " in pipex(*sizes, "--offload", "0.1", "--spare", "offload")
    assert set(last_line(pipex(*sizes, "--spare", "none", "--json"))["activations"]) == {"held"}


def test_a_plan_for_torch_holds_every_activation(pipex: Any, tmp_path: Path) -> None:
    sizes = ("plan", "-p", "4", "-m", "8", "--memory", "1", "--evaluations", "100")
    found = last_line(pipex(*sizes, "--out", str(tmp_path / "best.csv"), "--json"))
    assert set(found["activations"]) == {"held"}


def test_work_that_takes_no_time_is_no_mistake(pipex: Any) -> None:
    nothing = ("plan", "-p", "2", "-m", "2", "--f", "0", "--i", "0", "--w", "0", "--evaluations", "30")
    assert "0.00% above the bound" in pipex(*nothing)
    assert last_line(pipex(*nothing, "--json"))["distance"] == 0


def test_a_plan_for_measured_layers_is_priced_by_their_best_cut(pipex: Any, tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    heavy = Layer("head", 3.0, 3.0, 3.0, 8, 8, 0, 4)
    LayerCosts((*(Layer(f"block {n}", 1.0, 1.0, 1.0, 8, 8, 0, 4) for n in range(3)), heavy)).write(file)
    sizes = ("plan", "-p", "2", "-m", "4", "--layers", str(file), "--max-chunks", "1", "--evaluations", "30")
    found = last_line(pipex(*sizes, "--json"))
    assert found["limit"] is None
    assert found["makespan"] >= 4 * 9 + 3  # three blocks, then the head
    assert found["bound_makespan"] == 4 * 9 + 3
    assert last_line(pipex(*sizes, "--memory", "64", "--json"))["limit"] == [64, 64]
    for option in ("--f", "--weights", "--exchange"):
        said = pipex(*sizes, option, "2", code=1)
        assert "--layers excludes --f, --i, --w, --hop, --weights and --exchange" in said
    assert "--layers excludes --recompute and --offload" in pipex(*sizes, "--offload", "2", code=1)


def test_two_copies_are_proposed_where_weights_and_memory_say_that_there_is_room(pipex: Any, tmp_path: Path) -> None:
    times = ("--f", "100", "--i", "100", "--w", "65", "--hop", "2")
    sizes = ("plan", "-p", "4", "-m", "4", *times, "--max-chunks", "2", "--evaluations", "100")
    assert "two copies" not in pipex(*sizes, "--memory", "9")
    file = str(tmp_path / "two.plan")
    text = pipex(*sizes, "--memory", "9", "--weights", "2", "--out", file)
    assert "dualpipe with two copies of the model (" in next(
        line for line in text.splitlines() if "the best of" in line
    )
    assert Plan.from_text(Path(file).read_text()).placement.name == "bidirectional"
    found = last_line(pipex(*sizes, "--memory", "9", "--weights", "2", "--json"))
    dear = last_line(pipex(*sizes, "--memory", "9", "--weights", "2", "--exchange", "1", "--json"))
    assert (found["family"], dear["makespan"]) == ("dualpipe", found["makespan"] + 1)
    assert max(found["peak_memory"]) <= 9
    alone = last_line(pipex(*sizes, "--weights", "2,3,2,2", "--json"))
    assert alone["limit"] == [6, 7, 6, 6]  # one copy, and what 1f1b holds
    assert alone["family"] != "dualpipe"
    shown = last_line(pipex("view", file, *times, "--weights", "2", "--exchange", "5", "--json"))
    assert (shown["makespan"], shown["peak_memory"]) == (found["makespan"] + 5, found["peak_memory"])


def test_bytes_of_layers_count_their_weights_where_the_state_is_given(pipex: Any, tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    LayerCosts(tuple(Layer(f"block {n}", 3.0, 3.0, 2.0, 8, 8, 10, 4) for n in range(4))).write(file)
    sizes = ("plan", "-p", "4", "-m", "4", "--layers", str(file), "--evaluations", "30", "--memory", "150")
    assert last_line(pipex(*sizes, "--json"))["family"] != "dualpipe"
    counted = last_line(pipex(*sizes, "--state", "4", "--json"))
    assert counted["family"] == "dualpipe"
    assert 80 < max(counted["peak_memory"]) <= 150  # 40 bytes for each of two stages
    large = last_line(pipex(*sizes, "--state", "9", "--json"))  # 90 bytes for each: one copy fits
    assert large["family"] != "dualpipe"
    assert 90 < max(large["peak_memory"]) <= 150
    said = pipex(*sizes, "--state", "16", code=1)
    assert "memory limit of rank 0; got 150; needed at least 172, what one micro-batch holds there, and the" in said
    assert "--state is given without --layers" in pipex("plan", "-p", "2", "-m", "2", "--state", "4", code=1)


def test_a_plan_that_holds_more_than_the_memory_is_shown_with_a_word_about_it(pipex: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.plan"
    pipex("schedule", "1f1b", "-p", "2", "-m", "4", "--out", str(file))
    assert "rank 0 holds 2 at its peak, more than the 1 of --memory" in pipex("view", str(file), "--memory", "1")
    assert "--memory" not in pipex("view", str(file), "--memory", "2")
    found = last_line(pipex("view", str(file), "--memory", "1", "--json"))
    assert found["over_limit"] == [0]
    assert found["bound_makespan"] <= found["makespan"]


def test_a_picture_is_not_written_over_its_plan(pipex: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.plan"
    pipex("schedule", "1f1b", "-p", "2", "-m", "4", "--out", str(file))
    text = file.read_text()
    assert "is the plan itself" in pipex("view", str(file), "--html", str(tmp_path / "." / "a.plan"), code=1)
    assert file.read_text() == text


@pytest.mark.parametrize("spoil", [lambda text: text.replace(b"\n", b"\r\n"), lambda text: b"\xef\xbb\xbf" + text])
def test_a_plan_that_an_editor_has_changed_is_refused_by_what_it_did(pipex: Any, tmp_path: Path, spoil: Any) -> None:
    file = tmp_path / "a.plan"
    pipex("schedule", "1f1b", "-p", "2", "-m", "4", "--out", str(file))
    file.write_bytes(spoil(file.read_bytes()))
    assert "no byte-order mark, and line feeds alone" in pipex("view", str(file), code=1)


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pipex", "schedules"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "pipex schedules: [Errno 28] No space left on device\n"


# Files with other contents than expected.


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A plan's file, and a trace of it."""
    plan, folder = build("1f1b", 2, 3), tmp_path_factory.mktemp("traced")
    (folder / "plan").write_text(plan.to_text())
    ranks = [
        [
            Event(1, kind.value, stage, microbatch, int(1e6 * start), int(1e6 * end))
            for (stage, kind, microbatch, _), start, end in row
        ]
        for row in simulate(plan, Costs.uniform(plan)).timeline
    ]
    ranks[0] += [Event(1, "SEND_F", 0, 0, 10, 15), Event(1, "optimizer", -1, -1, 10**7, 10**7)]
    ranks[1] += [Event(1, "RECV_F", 1, 0, 8, 20)]
    write_trace(folder / "trace.json", ranks, plan.placement)
    return folder / "plan", json.loads((folder / "trace.json").read_text())


def layer_costs() -> Any:
    return json.loads(LayerCosts(tuple(Layer(*"a", *(1.0,) * 7) for _ in range(3)), bandwidth=2.0).to_text())


@pytest.mark.parametrize(
    "number", [pytest.param(range(150), id="some"), pytest.param(range(150, 2000), id="all", marks=pytest.mark.nightly)]
)
def test_files_changed_at_random_are_used_or_refused_by_name(
    pipex: Any, traced: tuple[Path, Any], number: range, tmp_path: Path
) -> None:
    plan, trace = traced
    commands = {
        "trace": (
            trace,
            ["view", str(plan), "--html", str(tmp_path / "page.html"), "--trace"],
            ["F", "RECV_B", "PP:0F1"],
        ),
        "layers": (layer_costs(), ["plan", "-p", "2", "-m", "2", "--evaluations", "5", "--layers"], [1e100, 1e-100]),
    }
    for name, (content, command, junk) in commands.items():
        codes = set()
        for seed in number:
            changed = copy.deepcopy(content)
            mutate(random.Random(f"{SEED} {name} {seed}"), changed, junk)
            (tmp_path / "file.json").write_text(json.dumps(changed))
            with case(name, seed):
                codes.add(main([*command, str(tmp_path / "file.json")]))
        assert codes == {0, 1}


def test_a_trace_without_a_step_is_named(pipex: Any, traced: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text('{"traceEvents": []}')
    said = pipex("view", str(traced[0]), "--trace", str(tmp_path / "empty.json"), code=1)
    assert "nothing to measure; got 0 steps" in said
