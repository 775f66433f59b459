"""``pipex bench`` knows its benchmarks by name, and imports the one that is chosen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipex.cli import main
from pipex.cli.bench import BENCHES

IMPORTED = """
import json, sys
from pipex.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(json.dumps([name for name in sys.modules if name == "torch" or name.startswith("pipex.")]))
"""


def imported(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("command", ["bench", "tune", "profile", "train"])
def test_help_imports_no_torch(command: str) -> None:
    found = imported(command, "--help")
    assert f"pipex.cli.{command}" in found
    assert "torch" not in found


def test_only_the_chosen_benchmark_is_imported() -> None:
    found = imported("bench", "drop-in", "--help")
    modules = {module for module, _ in BENCHES.values()}
    assert modules & found <= {"pipex.bench.drop_in", "pipex.bench.step"}, "step compares gradients for both"
    assert "pipex.cli.tune" not in found


@pytest.mark.parametrize("name", BENCHES)
def test_every_benchmark_says_what_it_measures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", name, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: pipex bench {name} [-h]")
    for option in ("-n COUNT", "-w COUNT", "--json", "--min-ratio CASE=RATIO,..."):
        assert option in said
    _, _, after = said.partition("\n\n")
    assert after[0].isupper(), "a description stands before the options"


@pytest.mark.parametrize("name", BENCHES)
def test_nothing_to_measure_is_said_before_anything_else(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", name, "-n", "0"]) == 1
    assert capsys.readouterr().err == (
        "pipex bench: InputError: nothing would be measured; got -n 0 -w 5; needed -n 1 or more, -w 0 or more\n"
    )
