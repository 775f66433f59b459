"""A layout says for every plan where a model's layers and tensors are; what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import host_world
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pipex
from pipex.cli import main
from pipex.errors import InputError, PeerFailed
from pipex.layout import Blueprint, Held, Layout, Tie
from pipex.partition import as_stages, layout_of, split_model
from pipex.plan import Plan, build

PLANS = [
    build("1f1b", 2, 4), build("interleaved", 2, 4, chunks=3), build("zbv", 3, 6), build("looped-bfs", 1, 2, chunks=4),
    build("hanayo", 2, 4, chunks=4), build("dualpipe", 2, 4), build("chimera", 4, 4),
]  # fmt: skip


def model() -> nn.Sequential:
    """8 layers: the first weight stands in the last layer too, and a norm in layers 2 and 6."""
    norm = nn.BatchNorm1d(4)
    layers = [nn.Linear(4, 4) for _ in range(8)]
    layers[7].weight = layers[0].weight
    return nn.Sequential(*(nn.Sequential(layer, norm) if n in (2, 6) else layer for n, layer in enumerate(layers)))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.family} {plan.placement.ranks}")
def test_everything_is_where_the_stages_have_it(plan: Plan) -> None:
    whole = model()
    stages = split_model(whole, plan)
    layout = layout_of(plan, stages)
    copies = 2 if plan.placement.name == "bidirectional" else 1
    every = stages * copies  # by stage of the plan
    assert [list(layers) for layers in layout.layers] == [
        list(range(stage.first_layer, stage.first_layer + len(stage.layers))) for stage in every
    ]
    tensors = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    assert {held.name: held.form for held in layout.blueprint.tensors} == {
        name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in tensors.items()
    }
    for held in layout.blueprint.tensors:
        own = [n for n, s in enumerate(every) if any(t is tensors[held.name] for t in (*s.parameters(), *s.buffers()))]
        assert list(layout.holders(held)) == own
        assert held.parameter is isinstance(tensors[held.name], nn.Parameter)
    for rank in range(plan.placement.ranks):
        mine = nn.ModuleList(every[s] for s in plan.placement.stages_of(rank))
        assert [stages[piece] for piece in layout.pieces_of(rank)] == sorted(mine, key=lambda stage: stage.index)
        assert layout.nbytes(rank) == sum(t.nbytes for t in (*mine.parameters(), *mine.buffers()))
    ends = {layout.rank_of(0), layout.rank_of(len(every) - 1)} if copies == 1 else {0, plan.placement.ranks - 1}
    assert {*layout.batch_ranks, *layout.target_ranks} == ends
    assert (layout.batch_ranks[0], layout.target_ranks[0]) == (layout.rank_of(0), layout.rank_of(len(stages) - 1))
    several = [name for name in tensors if sum(t is tensors[name] for s in every for t in set(s.parameters())) > 1]
    assert sorted(tie.name for tie in layout.ties) == sorted(several)
    crossing = {
        (one, other)
        for tie in layout.ties for one in tie.stages for other in tie.stages
        if layout.rank_of(one) != layout.rank_of(other)
    }  # fmt: skip
    assert list(layout.tied_edges) == sorted(crossing)


def test_what_ranks_would_not_agree_on_has_another_digest() -> None:
    plan = build("1f1b", 2, 4)
    layout = layout_of(plan, split_model(model(), plan))
    assert layout_of(plan, split_model(model(), plan)).digest == layout.digest
    untied = model()
    untied[7].weight = nn.Parameter(torch.ones(4, 4))
    others = [
        layout_of(plan, split_model(untied, plan)),
        layout_of(plan, split_model(model().double(), plan)),
        layout_of(plan, split_model(model(), plan, [3, 5])),
        layout_of(build("gpipe", 2, 4), split_model(model(), plan)),
        layout_of(plan, split_model(nn.Sequential(*model()[:7], nn.Tanh()), plan)),
    ]
    assert len({layout.digest, *(other.digest for other in others)}) == 6


def test_copies_and_versions_are_told() -> None:
    stages = [nn.Linear(4, 4, bias=False) for _ in range(4)]
    lines = list(layout_of(build("chimera", 4, 4), as_stages(stages)).lines())
    assert lines[0] == "rank 0, 128 bytes, batch, target"
    assert "  stage 4 → stage 5 on rank 2, a copy of stage 0 on rank 0" in lines
    assert not [line for line in lines if "is tied" in line]
    stages[3].weight = stages[0].weight
    *_, last = layout_of(build("chimera", 4, 4), as_stages(stages)).lines()
    assert last == "0.weight is tied between the stages 0, 3, 4, 7 (ranks 0, 3, 3, 0), whose gradients are added"
    first, *_ = layout_of(build("pipedream", 4, 8), as_stages([*stages[:3], nn.Linear(4, 4)])).lines()
    assert first == "rank 0, 64 bytes, 4 versions of what is trained, batch"


def test_what_does_not_fit_is_refused_by_name() -> None:
    plan = build("1f1b", 2, 4)
    blueprint = Blueprint(("Linear",) * 3, (Held("0.weight", "float32[1]", 4, True, (0, 2)),))
    assert Layout(plan, blueprint, (1, 2)).ties == (Tie("0.weight", (0, 1)),)
    for counts in ((1, 1), (1, 1, 1), (3, 0)):
        with pytest.raises(InputError, match=r"not all in one stage each; .* 2 counts of at least 1 with the sum 3"):
            Layout(plan, blueprint, counts)
    with pytest.raises(InputError, match=r"got \[1, 1, 1\] layers in 3 stages; needed 2 counts"):
        Layout(build("dualpipe", 2, 4), blueprint, (1, 1, 1))
    for layers in ((), (3,), (-1,), (2, 0), (1, 1)):
        with pytest.raises(InputError, match=r"0\.weight stands where no layer is"):
            dataclasses.replace(blueprint, tensors=(Held("0.weight", "float32[1]", 4, True, layers),))
    with pytest.raises(InputError, match=r"called alike; got 0\.weight"):
        dataclasses.replace(blueprint, tensors=blueprint.tensors * 2)


def other_models() -> None:
    width = 5 if pipex.current_world().rank else 6
    stages = [nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, width)]
    pipex.Pipeline(stages, build("1f1b", 3, 4), F.mse_loss)


def test_ranks_with_other_models_are_told_in_which_layer() -> None:
    words = r"the ranks disagree about layer 2; got Linear \(2\.weight float32\[6, 4\], .* float32\[5, 4\]"
    with pytest.raises(PeerFailed, match=words):
        host_world.launch(other_models, 3)


FACTORY = """
import torch
from torch import nn

def whole():
    found = nn.Sequential(*(nn.Linear(100_000, 100_000, bias=False) for _ in range(8)))  # 320 GB
    found[7].weight = found[0].weight
    return found

def measured():
    return whole(), None, None, None

def nothing():
    return 3
"""


@pytest.fixture
def plan_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "large_model.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step.plan").write_text(build("zbv", 2, 4).to_text())
    return str(tmp_path / "step.plan")


@pytest.mark.parametrize("factory", ["whole", "measured"])
def test_the_command_lays_out_what_no_machine_could_hold(
    plan_file: str, factory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layout", plan_file, f"large_model:{factory}"]) == 0
    text = capsys.readouterr().out
    assert "rank 0, 120,000,000,000 bytes, batch, target\n  stage 0 → stage 1 on rank 1\n    0: Linear (" in text
    assert "0.weight is tied between the stages 0, 3 (ranks 0, 0), whose gradients are added" in text
    assert main(["layout", plan_file, f"large_model:{factory}", "--json", "--balance", "1,2,2,3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["layers"] for stage in found["stages"]] == [[0], [1, 2], [3, 4], [5, 6, 7]]
    assert [rank["stages"] for rank in found["ranks"]] == [[0, 3], [1, 2]]
    assert found["tensors"][0] == {"name": "0.weight", "form": "float32[100000, 100000]", "stages": [0, 3]}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["large_model:nothing"], "large_model:nothing returned no model; got int; needed an nn.Module"),
        (["large_model:none"], "large_model has no function none"),
        (["large_model"], "no factory; got 'large_model'"),
        (["large_model:whole", "--balance", "1,x"], "unknown balance; got '1,x'"),
        (["large_model:whole", "--balance", "1,2"], "the layer counts do not fit; got [1, 2]"),
    ],
)
def test_the_command_refuses_by_name(
    plan_file: str, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layout", plan_file, *arguments]) == 1
    assert told in capsys.readouterr().err
