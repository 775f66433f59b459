"""A torch that pipex does not know: what still works there, and what it says of the rest."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from pipex import torch_internals
from pipex.errors import UnsupportedModule
from pipex.torch_internals import Name

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


OLDER = "import torch; del torch._C._will_engine_execute_node; torch.__version__ = '2.9.1'"


def test_without_a_name_of_autograd_plans_work_and_the_split_backward_says_what_lacks() -> None:
    said = run(f"""{OLDER}
import pipex
pipex.build("zb-h1", 2, 4)
pipex.Pipeline, pipex.split_model, pipex.launch
from pipex.backward import Splitter
for refused in (lambda: Splitter(()), lambda: pipex.drop_in()):
    try:
        refused()
    except pipex.errors.UnsupportedModule as error:
        print(error)
""")
    lines = said.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "torch 2.9.1; got no torch._C._will_engine_execute_node; needed torch 2.11 to 2.15" in line


def test_without_a_name_of_pipelines_training_works_and_drop_in_says_what_lacks() -> None:
    said = run("""
import torch
from torch.distributed.pipelining import stage
del stage._PipelineStageBase.scale_grads
import pipex
pipeline = pipex.Pipeline([torch.nn.Linear(2, 2)], pipex.build("zb-h1", 1, 2), torch.nn.functional.mse_loss,
                          optimizer=torch.optim.SGD)
pipeline.step(torch.ones(4, 2), torch.zeros(4, 2))
try:
    pipex.drop_in()
except pipex.errors.UnsupportedModule as error:
    print(error)
""")
    assert "got no torch.distributed.pipelining.stage._PipelineStageBase.scale_grads; needed torch 2.11" in said


def test_names_that_are_gone_or_called_otherwise_are_all_told() -> None:
    names = [
        Name("torch.nn.functional.linear"),
        Name("torch.nothing._at_all"),
        Name("json.dumps", ("obj", "file")),
        Name("json.dumps", ("obj",)),
    ]
    gone, otherwise = torch_internals.differences(names)
    assert gone == "no torch.nothing._at_all"
    assert otherwise.startswith("json.dumps(obj, skipkeys,")
    assert otherwise.endswith("in place of (obj, file)")


def test_this_torch_has_them_all() -> None:
    torch_internals.require_split_backward()
    assert torch_internals.differences(torch_internals.REPLACED) == []


def test_names_for_other_users_are_missed_by_these_alone() -> None:
    said = run("""
import torch
del torch.cuda._sleep, torch._foreach_norm, torch._C._from_dlpack
import pipex
from pipex import torch_internals
with pipex.drop_in():
    pass
pipex.backward.Splitter(())
for name in ("gpu_sleep", "foreach_norm", "from_dlpack"):
    try:
        getattr(torch_internals, name)(1)
    except pipex.errors.UnsupportedModule as error:
        print(error)
""")
    sleep, norm, dlpack = said.splitlines()
    assert sleep.startswith("a measurement on a GPU does not work with torch")
    assert "got no torch.cuda._sleep; needed torch 2.11" in sleep
    assert norm.startswith("clipping of gradients does not work with torch")
    assert "got no torch._foreach_norm; needed" in norm
    assert dlpack.startswith("a transport through shared memory does not work with torch")
    assert "got no torch._C._from_dlpack; needed" in dlpack


def test_a_name_that_is_missing_refuses_to_be_used() -> None:
    for missing in (
        torch_internals._private("torch._C._no_such_thing", "this test"),
        torch_internals._attribute("torch._C", "_no_such_thing", "this test"),
    ):
        with pytest.raises(UnsupportedModule, match=r"this test .* no torch\._C\._no_such_thing"):
            missing(1)


def test_the_range_is_the_package_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest, newest = torch_internals.OLDEST, torch_internals.NEWEST
    major, minor = map(int, newest.split("."))
    assert f"torch>={oldest},<{major}.{minor + 1}" in project["dependencies"]
    page = (ROOT / "docs" / "torch-versions.md").read_text()
    rows = re.findall(r"^\| (2\.\d+)\.\d+ \| (3\.\d+)\.\d+ \| ([\d,]+) \| (\d+) \|", page, flags=re.MULTILINE)
    assert {oldest, newest} <= {version for version, *_ in rows}
    assert all(failed == "0" for *_, failed in rows)
    pythons = {python for _, python, *_ in rows}
    assert {f"Programming Language :: Python :: {python}" for python in pythons} == {
        name for name in project["classifiers"] if re.search(r":: 3\.\d+$", name)
    }
    assert torch.__version__.split("+")[0].rsplit(".", 1)[0] in {version for version, *_ in rows}
