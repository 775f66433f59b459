"""``pipex profile`` as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import small_llama
import torch

from pipex.cli import main
from pipex.cli.plans.files import read_plan
from pipex.partition import split_model
from pipex.plan.layer_costs import LayerCosts
from pipex.runtime import worlds

SMALL = ["--layers", "2", "--width", "16", "--heads", "2", "--context", "16", "--batch", "8", "--passes", "2"]

USER = """
import torch
from torch import nn

def made():
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1)), torch.randn(4, 8), torch.randn(4, 1), loss

def loss(output, target):
    return (output - target).square().mean()

def pair():
    return nn.Linear(1, 1), torch.ones(1)

number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module ``user_model_to_profile``."""
    (tmp_path / "user_model_to_profile.py").write_text(USER)
    (tmp_path / "user_model_that_needs_more.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(worlds, "set_threads", lambda ranks: None)  # more threads here would hang forks of other tests
    return tmp_path


def pipex(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """Runs the command; returns stdout and stderr."""
    assert main(["profile", *arguments]) == code
    out, err = capsys.readouterr()
    return out, err


def test_the_model_of_train_is_measured_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipex", "profile", *SMALL, "--ranks", "2", "--out", "costs.json", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    costs = LayerCosts.read(tmp_path / "costs.json")
    assert LayerCosts.from_text(json.dumps(result["costs"])) == costs
    assert [layer.name for layer in costs.layers] == ["embed", "blocks.0", "blocks.1", "head"]
    assert all(layer.time > 0 for layer in costs.layers)
    assert costs.layers[1].output == 16 * 16 * 4  # one sequence: a batch of 8 in 8 micro-batches
    assert result["ranks"] == 2
    assert sum(result["counts"]) == 4
    assert 0 < result["bottleneck"] <= result["bottleneck_uniform"]
    assert "blocks.1" in done.stderr


def test_a_table_for_people(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = pipex(capsys, *SMALL, "--tied")
    lines = out.splitlines()
    head = "layer F µs I µs W µs activation deferred parameters output waits (I+W)/B"
    assert lines[0].split() == head.split()
    assert [line.split()[-2] for line in lines[1:6]] == ["100%"] * 5
    assert [line.split()[0] for line in lines[1:6]] == ["embed", "blocks.0", "blocks.1", "head", "all"]
    assert lines[1].split()[6] == "17.0"  # KiB: 256 tokens and 16 positions of width 16
    assert "int64[1, 16]" in lines[6]
    assert lines[7].startswith("4 ranks: 1, 1, 1, 1 layers; the slowest rank takes")
    assert "9 ranks: more than there are layers" in pipex(capsys, *SMALL, "--ranks", "9")[0]


def test_a_user_s_model_is_measured(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = pipex(capsys, "user_model_to_profile:made", "--json", "--ranks", "1", "--passes", "1")
    result = json.loads(out)
    layers, splits = result["costs"]["layers"], result["split"]
    assert [(layer["name"], layer["parameters"]) for layer in layers] == [("0", 64 * 9 * 4), ("1", 0), ("2", 65 * 4)]
    assert [split["deferred_share"] for split in splits] == [1, None, 1]
    for layer, split in zip(layers, splits, strict=True):
        halves = layer["input_gradient"] + layer["weight_gradient"]
        assert halves < 100 * split["over_whole"], "a whole backward takes seconds, but not a hundred"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing_of_that_name:made"], "there is no module nothing_of_that_name"),
        (["user_model_to_profile.inner:made"], "there is no module user_model_to_profile.inner"),
        (["user_model_to_profile:nothing"], "user_model_to_profile has no function nothing"),
        (["user_model_to_profile:number"], "user_model_to_profile has no function number"),
        (["user_model_to_profile:pair"], "user_model_to_profile:pair returned something else; got (Linear, Tensor)"),
        (["user_model_to_profile:loss2"], "needed one of made, loss, pair"),
        (["user_model_to_profile"], "no factory; got 'user_model_to_profile'; needed MODULE:FACTORY"),
        ([":made"], "no factory; got ':made'"),
        (["user_model_to_profile:made", "--width", "32"], "--width is about pipex train's model"),
        (["user_model_to_profile:made", "--hf", "."], "--hf is about pipex train's model"),
        (["--hf", ".", "--width", "32"], "--hf excludes --width"),
        (["--hf", "."], "there is no model in .; got no file config.json"),
        (["--out", "/nowhere/x.json", *SMALL], "cannot write --out /nowhere/x.json; got No such file"),
        (["--ranks", "0"], "--ranks is out of range; got 0"),
        (["--passes", "0"], "--passes is out of range; got 0"),
        (["--width", "10", "--heads", "4"], "width 10"),
        (["--batch", "2"], "--batch 2 for --microbatches 8"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = pipex(capsys, *arguments, code=1)
    assert message in err
    assert err.count("\n") == 1


def test_the_units_of_a_hugging_face_model_are_measured_and_planned_for(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_llama.config().save_pretrained(here / "llama")
    files = ["--hf", "llama", "--out", "costs.json"]
    out, _ = pipex(capsys, *files, "--context", "16", "--ranks", "2", "--passes", "1")
    costs = LayerCosts.read("costs.json")
    units = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(4)), "model.norm, lm_head"]
    assert [layer.name for layer in costs.layers] == units
    assert "int64[4, 16]" in costs.about
    assert [line.partition("  ")[0] for line in out.splitlines()[1:7]] == units
    assert main(["plan", "-p", "2", "-m", "4", "--layers", "costs.json", "--out", "step.plan"]) == 0
    plan = read_plan("step.plan")
    sample = {"input_ids": torch.ones(2, 8, dtype=torch.int64)}
    stages = split_model(small_llama.model(), plan, costs, sample=sample)
    assert sum(len(stage.layers) for stage in stages) == 6


def test_a_factory_may_leave_the_loss_to_the_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "user_model_with_a_loss.py").write_text(
        "import small_llama, torch\n\ndef made():\n    ids = torch.ones(2, 8, dtype=torch.int64)\n"
        "    return small_llama.model(), {'input_ids': ids, 'labels': ids}, None, 'model'\n"
    )
    out, _ = pipex(capsys, "user_model_with_a_loss:made", "--json", "--passes", "1")
    assert len(json.loads(out)["costs"]["layers"]) == 6


def test_what_the_user_s_own_module_lacks_is_not_mistaken_for_it(here: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        main(["profile", "user_model_that_needs_more:made"])


def test_help_says_what_a_factory_is_without_importing_torch() -> None:
    code = (
        "import sys\nfrom pipex.cli import main\ntry:\n    main(['profile', '--help'])\nexcept SystemExit:\n    pass\n"
    )
    check = "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
    assert "(model, sample, target, loss_fn)" in done.stdout
