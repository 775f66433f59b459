"""Joining a run through the environment."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipex.errors import InputError
from pipex.transport.group import store_from_environment

PROGRAM = """
import os
from pipex.transport.group import GroupWorld, store_from_environment
store, rank, ranks = store_from_environment(timeout=30.0)
world = GroupWorld(store, rank, ranks, timeout=30.0)
gathered = world.exchange(b"from %d" % rank)
world.close()
line = f"{os.environ['TORCHELASTIC_USE_AGENT_STORE']} {rank} {b', '.join(gathered).decode()}"
os.write(1, line.encode() + b"\\n")  # in one piece: both ranks have one stdout
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


def test_ranks_under_torchrun_meet_in_the_agents_store(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"True {rank} from 0, from 1" for rank in (0, 1)]


def test_rank_0_hosts_the_store_on_the_given_address_only(environment: pytest.MonkeyPatch) -> None:
    store, rank, ranks = store_from_environment()
    assert (rank, ranks) == (0, 1)
    store.set("key", "value")
    assert store.get("key") == b"value"
    local = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    port = store.underlying_store.port
    assert [fields[1] for fields in local if fields[1].endswith(f":{port:04X}") and fields[3] == "0A"] == [
        f"0100007F:{port:04X}"
    ]
    six = Path("/proc/self/net/tcp6").read_text()
    assert not [line for line in six.splitlines() if f":{port:04X} " in line.split("0A")[0] and " 0A " in line]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MASTER_PORT", None, "got no MASTER_PORT"),
        ("RANK", "first", "whole numbers"),
        ("RANK", "1", "got rank 1 of 1"),
        ("MASTER_ADDR", "192.0.2.1", "cannot listen on MASTER_ADDR:MASTER_PORT"),
    ],
)
def test_an_environment_that_describes_no_run_is_refused(
    environment: pytest.MonkeyPatch, name: str, value: str | None, message: str
) -> None:
    if value is None:
        environment.delenv(name)
    else:
        environment.setenv(name, value)
    with pytest.raises(InputError, match=message):
        store_from_environment()
