"""``pipex train`` as a person runs it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import TORCHRUN, last_line, pipex
from hosts import INTERFACE, two_hosts

from pipex.state import Checkpoint

SMALL = ["--layers", "2", "--width", "16", "--heads", "2", "--context", "16", "--batch", "8", "--microbatches", "4"]


def test_trains_on_the_standard_library_and_reports(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    stdout, _ = pipex("train", *SMALL, "--ranks", "2", "--steps", "30", "--check", "--json", "--trace", str(trace))
    result = last_line(stdout)
    assert result["schedule"] == "zb-h1"
    assert (result["ranks"], result["microbatches"], result["steps"]) == (2, 4, 30)
    assert result["loss_last"] < result["loss_first"] - 1
    assert result["identical"] is True
    assert result["peak_activations"] == [2, 2]
    assert len(result["stage_step_ms"]) == 2
    assert 0 <= result["bubble_makespan_predicted"] < 1
    assert 0 <= result["bubble_makespan_measured"] < 1
    assert 0 < result["p2p_us_p50"] <= result["p2p_us_p99"]
    assert result["oversubscribed"] == (len(os.sched_getaffinity(0)) < 2)
    names = {row.get("name") for row in json.loads(trace.read_text())["traceEvents"]}
    assert {"PP:0F0", "PP:1I3", "PP:0W3", "PP:1RECV_F0"} <= names


def test_a_resumed_run_ends_in_the_same_bits(here: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 40)
    common = ["train", str(text), *SMALL, "--dropout", "0.1"]
    here(*common, "--ranks", "2", "--steps", "9", "--save", str(tmp_path / "whole"))
    here(*common, "--ranks", "2", "--steps", "4", "--save", str(tmp_path / "part"))
    stdout, _ = here(*common, "--ranks", "1", "--steps", "9", "--resume", str(tmp_path / "part"), "--save",
                     str(tmp_path / "part"), "--check", "--json")  # fmt: skip
    assert last_line(stdout)["identical"] is True
    whole, part = (Checkpoint.open(tmp_path / name) for name in ("whole", "part"))
    assert (whole.step, part.step) == (9, 9)
    assert whole.tensors == part.tensors
    for (name, expected), found in zip(
        whole.load(whole.tensors).items(), part.load(whole.tensors).values(), strict=True
    ):
        assert expected.equal(found), name


@pytest.mark.parametrize("schedule", ["pipedream", "pipedream-2bw", "dualpipe"])
def test_other_weights_and_copies_have_the_bits_of_one_process_across_a_resume(
    here: Callable[..., tuple[str, str]], tmp_path: Path, schedule: str
) -> None:
    common = ["train", *SMALL, "--dropout", "0.1", "--schedule", schedule, "--ranks", "2", "--check", "--json"]
    stdout, _ = here(*common, "--steps", "2", "--save", str(tmp_path), "--trace", str(tmp_path / "trace"))
    assert last_line(stdout)["identical"] is True
    stdout, _ = here(*common, "--steps", "4", "--resume", str(tmp_path))
    result = last_line(stdout)
    assert (result["identical"], result["steps"]) == (True, 2)
    if schedule.startswith("pipedream"):
        names = {row.get("name") for row in json.loads((tmp_path / "trace").read_text())["traceEvents"]}
        assert "PP:1UPDATE3" in names


def test_a_plain_report_for_people(here: Callable[..., tuple[str, str]]) -> None:
    stdout, _ = here("train", *SMALL, "--ranks", "2", "--steps", "3", "--schedule", "1f1b")
    for words in ("1f1b, 2 ranks", "tokens/s", "makespan bubble", "where a step's time went"):
        assert words in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "2f2b"], "naive, gpipe, 1f1b, interleaved, "),
        (["--microbatches", "0"], "at least 1"),
        (["--batch", "4", "--microbatches", "8"], "--batch 4 for --microbatches 8"),
        (["--ranks", "9", "--layers", "2"], "9 stages"),
        (["--ranks", "100000"], "a model of 10 layers cannot be cut into 100000 stages"),
        (["--schedule", "forward-only"], "forward-only has no backward"),
        (["--width", "1000000000"], "pipex train: "),
        (["--width", "10", "--heads", "4"], "width 10"),
        (["--resume", "/nowhere"], "there is no checkpoint in /nowhere"),
        (["/nowhere.txt"], "/nowhere.txt"),
        (["--trace", "/nowhere/t.json"], "cannot write --trace /nowhere/t.json; got No such file"),
        (["--save", "/proc/nowhere"], "cannot write --save /proc/nowhere"),
        (["--timeout", "inf"], "--timeout is out of range; got inf"),
        (["--seed", "-1"], "--seed is out of range"),
        (["--device", "tpu"], "no such device; got 'tpu'"),
        (["--plan", "a.plan", "--ranks", "4", "--schedule", "zb-h1"], "--plan excludes --ranks, --schedule"),
    ],
)
def test_bad_input_is_one_line_on_stderr(
    here: Callable[..., tuple[str, str]], arguments: list[str], message: str
) -> None:
    _, stderr = here("train", "--steps", "1", *arguments, code=1)
    assert message in stderr
    assert "Traceback" not in stderr


def test_a_command_with_bad_input_has_its_exit_code_and_its_line_only() -> None:
    stdout, stderr = pipex("train", "--steps", "1", "--resume", "/nowhere", code=1)
    assert (stdout, stderr.count("\n")) == ("", 1)
    assert stderr.startswith("pipex train: CheckpointError: there is no checkpoint in /nowhere")


def test_a_loss_that_is_not_a_number_is_compared_by_its_bits_and_is_null_in_json(
    here: Callable[..., tuple[str, str]],
) -> None:
    stdout, _ = here("train", *SMALL, "--ranks", "2", "--steps", "3", "--lr", "1e30", "--check", "--json")
    result = last_line(stdout)
    assert result["identical"] is True
    assert result["loss_last"] is None


def test_a_reader_that_has_seen_enough_is_no_crash() -> None:
    done = subprocess.run(f"{sys.executable} -m pipex info | true", shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_usage_errors_are_told_apart() -> None:
    pipex("train", "--steps", "many", code=2)
    pipex("nothing", code=2)
    assert "train" in pipex("--help")[0]


def test_help_does_not_import_torch() -> None:
    code = """
import sys
from pipex.cli import main
try:
    main(["train", "--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.long
def test_the_same_program_joins_torchrun() -> None:
    stdout, _ = pipex("train", *SMALL, "--steps", "3", "--check", "--json", command=TORCHRUN)
    assert last_line(stdout)["identical"] is True


def train_on_two_hosts(address: str, places: Sequence[tuple[str, ...]], ranks_each: int, **environment: str) -> None:
    """One agent on each host, so that LOCAL_WORLD_SIZE is not WORLD_SIZE; the numbers must be those of one process."""

    def agent(node: int, place: tuple[str, ...]) -> subprocess.Popen[str]:
        here = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", str(ranks_each)]
        master = ["--master-addr", address, "--master-port", str(port)]
        program = ["-m", "pipex", "train", *SMALL, "--layers", "4", "--steps", "3", "--check", "--json"]
        command = [*place, sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *here, *master, *program]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = [agent(node, place) for node, place in enumerate(places)]
    try:
        outputs = [agent.communicate(timeout=100) for agent in agents]
    finally:
        for process in agents:
            process.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    result = last_line(outputs[0][0])
    assert result["identical"] is True
    assert result["ranks"] == 2 * ranks_each


@pytest.mark.long
def test_ranks_of_several_agents_join_through_torch_distributed() -> None:
    train_on_two_hosts("127.0.0.1", [(), ()], 1)


@pytest.mark.long
def test_the_ranks_of_a_killed_agent_die_with_it_and_the_others_say_so() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = []
    for node in (0, 1):
        where = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *where, "-m", "pipex", "train"]
        pipe = subprocess.PIPE
        agents.append(subprocess.Popen([*command, *SMALL, "--steps", "1000000"], stdout=pipe, stderr=pipe, text=True))
    try:
        assert agents[0].stderr is not None
        assert any(line.startswith("step ") for line in agents[0].stderr)  # it trains
        agents[1].kill()
        agents[1].communicate(timeout=30)  # past it, nobody holds the other ends of the pipes
        _, stderr = agents[0].communicate(timeout=60)
        assert "PeerLost: rank 1 is gone" in stderr
        assert agents[0].returncode == 1
    finally:
        for process in agents:
            process.terminate()  # a live agent ends its ranks


@pytest.mark.long
def test_ranks_of_two_hosts_train_to_the_bits_of_one_process() -> None:
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(two_hosts())
        except OSError as error:
            pytest.skip(str(error))
        places = [host.command for host in hosts]
        train_on_two_hosts(hosts[0].address, places, 2, GLOO_SOCKET_IFNAME=INTERFACE)


def test_info_says_what_there_is(here: Callable[..., tuple[str, str]]) -> None:
    facts = last_line(pipex("info", "--json")[0])
    assert facts["shared_memory"] == "built"
    assert "torch" in here("info")[0]
