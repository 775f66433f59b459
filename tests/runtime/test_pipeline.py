"""What a pipeline does besides its numbers: shapes that change, checkpoints, events, agreement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_world
import pytest
import torch
from torch import Tensor, nn

import pipex
from pipex.errors import CheckpointError, ConfigMismatch, InputError, PeerFailed, PipexError, UnsupportedModule
from pipex.observe import Recorder
from pipex.plan import Action, Kind, Placement, Plan
from pipex.runtime.reference import OneProcess

LOSS = nn.functional.mse_loss


def layers(width: int = 6) -> nn.Sequential:
    torch.manual_seed(4)
    blocks = [nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(*blocks, nn.Linear(width, 2))


def data(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 6, generator=generator), torch.randn(samples, 2, generator=generator)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def pipeline(family: str = "zb-h1", microbatches: int = 2, **options: Any) -> pipex.Pipeline:
    ranks = pipex.current_world().ranks
    options = {"optimizer": adam, **options}
    return pipex.Pipeline(pipex.split_model(layers(), ranks), pipex.build(family, ranks, microbatches), LOSS, **options)


BATCHES = [8, 12, 5, 12, 8]  # samples of each step: growing, shrinking, uneven


def changing_batches() -> list[float]:
    pipe = pipeline()
    losses = []
    for step, samples in enumerate(BATCHES):
        losses += [pipe.step(*data(samples, step)), pipe.evaluate(*data(samples + 1, 100 + step))]
    return losses


def test_batches_of_changing_size_and_buffers_in_between() -> None:
    """BatchNorm's running statistics see every micro-batch once, and nothing else."""
    process = OneProcess(pipex.split_model(layers(), 2), 2, LOSS, optimizer=adam)
    expected = []
    for step, samples in enumerate(BATCHES):
        expected += [process.step(*data(samples, step)), process.evaluate(*data(samples + 1, 100 + step))]
    assert host_world.launch(changing_batches, 2) == [expected, expected]


def save_and_go_on(directory: str) -> list[float]:
    pipe = pipeline()
    for step in range(3):
        pipe.step(*data(8, step))
    pipe.save(directory, {"note": "three steps"})
    return [pipe.step(*data(8, step)) for step in range(3, 6)]


def load_and_go_on(directory: str) -> list[Any]:
    pipe = pipeline()
    meta = pipe.load(directory)
    return [meta, pipe.steps, *(pipe.step(*data(8, step)) for step in range(3, 6))]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_checkpoint_goes_on_bit_for_bit_on_any_number_of_ranks(ranks: int, tmp_path: Path) -> None:
    expected = host_world.launch(save_and_go_on, 2, args=(str(tmp_path),))[0]
    for meta, steps, *losses in host_world.launch(load_and_go_on, ranks, args=(str(tmp_path),)):
        assert meta == {"note": "three steps"}
        assert steps == 3
        assert losses == expected


def save_where_it_cannot(directory: str) -> str:
    pipe = pipeline()
    pipe.step(*data(8, 0))
    with pytest.raises(CheckpointError) as error:
        pipe.save(directory)
    pipe.step(*data(8, 1))  # training goes on
    return str(error.value)


def test_a_save_that_fails_fails_on_every_rank(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    messages = host_world.launch(save_where_it_cannot, 2, args=(str(file),))
    assert messages[0] == messages[1]
    assert "no checkpoint was saved" in messages[0]


def watched() -> dict[str, Any]:
    recorder = Recorder(steps=1)
    pipe = pipeline("1f1b", 3, observer=recorder)
    pipe.step(*data(6, 0))
    return {"names": [event.name for event in recorder.events], "peak": pipe.peak_activations}


def test_events_follow_the_plan() -> None:
    first, second = host_world.launch(watched, 2)
    tail = ["reduce", "optimizer"]
    assert first["names"] == ["0F0", "0SEND_F0", "0F1", "0SEND_F1", "0RECV_B0", "0B0", "0F2", "0SEND_F2",
                              "0RECV_B1", "0B1", "0RECV_B2", "0B2", *tail]  # fmt: skip
    assert second["names"] == ["1RECV_F0", "1F0", "1B0", "1SEND_B0", "1RECV_F1", "1F1", "1B1", "1SEND_B1",
                               "1RECV_F2", "1F2", "1B2", "1SEND_B2", *tail]  # fmt: skip
    assert (first["peak"], second["peak"]) == (2, 1)


def only_where_needed() -> float:
    world = pipex.current_world()
    x, y = data(8, 0)
    return pipeline().step(x if world.rank == 0 else None, y if world.rank == world.ranks - 1 else None)


def everywhere() -> float:
    return pipeline().step(*data(8, 0))


def test_batch_and_target_are_needed_only_where_they_are_read() -> None:
    assert host_world.launch(only_where_needed, 3) == host_world.launch(everywhere, 3)


def disagree(what: str) -> None:
    rank = pipex.current_world().rank
    if what == "plan":
        pipeline("1f1b" if rank else "gpipe")
    elif what == "micro-batches":
        pipeline(microbatches=2 + rank)
    elif what == "layers per stage":
        pipex.Pipeline(pipex.split_model(layers(), 2, [2 + rank, 3 - rank]), pipex.build("1f1b", 2, 2), LOSS)
    elif what == "clip_norm":
        pipeline(clip_norm=None if rank else 1.0)
    else:
        x, y = data(8, 0)
        pipe = pipeline()
        pipe.step(x.double() if rank and what == "dtype" else x[: 8 - rank], y)


@pytest.mark.parametrize(
    ("what", "both"),
    [
        ("plan", ("gpipe", "1f1b")),
        ("micro-batches", ("2 on rank 0", "3 on rank 1")),
        ("layers per stage", ("[2, 3] on rank 0", "[3, 2] on rank 1")),
        ("clip_norm", ("1.0 on rank 0", "None on rank 1")),
        ("dtype", ("float32", "float64")),
        ("samples", ("[8, 6]", "[7, 6]")),
    ],
)
def test_ranks_that_disagree_are_told_both_values(what: str, both: tuple[str, str]) -> None:
    with pytest.raises(PeerFailed) as error:
        host_world.launch(disagree, 2, args=(what,))
    assert ConfigMismatch.__name__ in str(error.value)
    for value in both:
        assert value in str(error.value)


def test_evaluation_leaves_every_module_in_its_mode() -> None:
    pipe = pipeline()
    frozen = next(m for m in pipe.local_stages[0].modules() if isinstance(m, nn.BatchNorm1d))
    frozen.eval()
    pipe.evaluate(*data(8, 0))
    assert [m for m in pipe.local_stages[0].modules() if not m.training] == [frozen]


def call_different_methods(directory: str) -> None:
    pipe = pipeline()
    pipe.step(*data(8, 0))
    if pipe.world.rank == 0:
        pipe.save(directory)
    else:
        pipe.evaluate(*data(8, 1))


def test_ranks_that_call_different_methods_are_told_both(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match=r"ConfigMismatch: the ranks disagree about the call.*(save|evaluate)"):
        host_world.launch(call_different_methods, 2, args=(str(tmp_path),))


def solo(loss: Any) -> pipex.Pipeline:
    return pipex.Pipeline([layers()], pipex.build("1f1b", 1, 2), loss, optimizer=adam)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pipeline().step(torch.zeros(1, 6), torch.zeros(1, 2)), "1 samples for 2 micro-batches"),
        (lambda: pipeline().step(torch.zeros(4, 6), torch.zeros(3, 2)), "4 and 3 samples"),
        (lambda: pipeline().step(None, torch.zeros(4, 2)), "needs the batch"),
        (lambda: pipeline().step(torch.zeros(4, 6), None), "needs the target"),
        (lambda: pipeline().step("text", torch.zeros(4, 2)), "got str"),
        (lambda: pipeline(optimizer=None).step(*data(4, 0)), "got no optimizer"),
        (lambda: solo(lambda a, b: a - b).step(*data(4, 0)), "must return the mean loss"),
        (lambda: solo(nn.Linear(2, 2)), "loss_fn has parameters"),
        (lambda: pipex.Pipeline([layers()], pipex.build("1f1b", 2, 2), LOSS), "a plan for 2"),
        (lambda: pipex.Pipeline([layers(), layers()], pipex.build("1f1b", 1, 2), LOSS), "got 2 stages"),
        (lambda: pipex.build("1f1b", 2, 0), "too few micro-batches"),
        (lambda: pipex.build("2f2b", 2, 1), "needed one of naive, gpipe, 1f1b, interleaved"),
        (lambda: pipex.launch(everywhere, 0), "got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_its_numbers(call: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)


def closed(directory: Path) -> int:
    pipe = pipeline("1f1b")
    batch = data(4, 0)
    pipe.step(*batch)
    pipe.close()
    pipe.close()
    for call in (pipe.step, pipe.evaluate):
        with pytest.raises(PipexError, match="this pipeline is closed"):
            call(*batch)
    pipe.save(directory)
    return pipe.load(directory) == {} and pipe.steps


def test_a_closed_pipeline_says_so_and_can_still_be_saved(tmp_path: Path) -> None:
    assert pipex.launch(closed, 2, args=(tmp_path,)) == [1, 1]


def test_a_pipeline_that_has_failed_says_so() -> None:
    pipe = solo(lambda output, target: output - target)
    with pytest.raises(InputError):
        pipe.step(*data(4, 0))
    for call in (pipe.step, pipe.evaluate, pipe.forward_backward):
        with pytest.raises(PipexError, match="has failed before"):
            call(*data(4, 0))


LOOP = Placement("loop", 2)


def run_plan(plan: Plan) -> float:
    return pipex.Pipeline(pipex.split_model(layers(), 2), plan, LOSS, optimizer=adam).step(*data(4, 0))


FORWARD_ONLY = Plan(
    "forward-only",
    LOOP,
    3,
    tuple(tuple(Action(s, Kind.F, m) for m in range(3)) for s in (0, 1)),
    (1, 1),
    update="never",
)


def test_a_plan_without_a_backward_evaluates() -> None:
    expected = OneProcess(pipex.split_model(layers(), 2), 3, LOSS).evaluate(*data(7, 1))
    assert host_world.launch(evaluate_twice, 2) == [[expected, expected]] * 2


def evaluate_twice() -> list[float]:
    pipe = pipex.Pipeline(pipex.split_model(layers(), 2), FORWARD_ONLY, LOSS)
    return [pipe.evaluate(*data(7, 1)), pipe.evaluate(*data(7, 1))]


def test_a_plan_without_a_backward_does_not_train() -> None:
    with pytest.raises(PeerFailed, match="InputError: this pipeline cannot train; got forward-only, a plan without a"):
        host_world.launch(run_plan, 2, args=(FORWARD_ONLY,))


class Adjacency(nn.Module):
    """Multiplies with a sparse buffer, whose memory no tensor can be a view of."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix: Tensor
        self.register_buffer("matrix", torch.eye(6).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.matrix, x.t()).t()


def test_a_stage_may_have_a_sparse_buffer() -> None:
    stages, plan = [Adjacency(), nn.Linear(6, 2)], pipex.build("looped-bfs", 1, 2, chunks=2)
    batch, target = data(4, 0)
    assert pipex.Pipeline(stages, plan, LOSS).evaluate(batch, target) == pytest.approx(
        LOSS(stages[1](batch), target).item()
    )


class Returning(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(x)


NOT_DENSE: dict[str, Callable[[Tensor], Any]] = {
    "a torch.sparse_coo tensor": lambda x: x.to_sparse(),
    "a nested tensor": lambda x: torch.nested.nested_tensor(list(x)),
    "list": list,
    "tuple": lambda x: (),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("got", NOT_DENSE)
def test_an_output_that_cannot_be_sent_is_refused_by_name(got: str) -> None:
    plan = pipex.build("looped-bfs", 1, 2, chunks=2)
    with pytest.raises(UnsupportedModule, match=f"stage 0 .* got {got}; needed a dense tensor"):
        pipex.Pipeline([Returning(NOT_DENSE[got]), nn.Linear(6, 2)], plan, LOSS).evaluate(*data(4, 0))
