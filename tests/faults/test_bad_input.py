"""Bad input gets a clear error on every rank, with the numbers, before anything is lost."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipex
from pipex import cli
from pipex.errors import InputError, PeerFailed, PipexError, PlanError
from pipex.runtime import worlds

pytestmark = pytest.mark.timing

mse = nn.functional.mse_loss


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def linears(count: int = 2) -> list[nn.Module]:
    return [nn.Linear(4, 4) for _ in range(count)]


def pipeline(
    stages: list[nn.Module] | None = None, plan: Any = None, loss: Any = mse, **options: Any
) -> pipex.Pipeline:
    options = {"optimizer": sgd, **options}
    return pipex.Pipeline(stages or linears(), plan or pipex.build("1f1b", 2, 2), loss, **options)


def step(pipe: pipex.Pipeline, samples: int = 4, dtype: torch.dtype = torch.float32) -> float:
    x = torch.ones(samples, 4, dtype=dtype)
    return pipe.step(x, x)


@pytest.fixture
def errors(tmp_path: Path) -> Callable[..., list[str]]:
    """``errors(body)`` runs it on two ranks and returns, by rank, the class and message of what it raised."""

    def run(body: Callable[[int], object]) -> list[str]:
        def rank_main() -> None:
            rank = worlds.current_world().rank
            try:
                body(rank)
            except Exception as error:
                (tmp_path / str(rank)).write_text(f"{type(error).__name__}: {error}")
                raise

        with pytest.raises(PeerFailed):
            pipex.launch(rank_main, 2)
        return [path.read_text() if (path := tmp_path / str(rank)).exists() else "" for rank in range(2)]

    return run


# Between ranks.


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (lambda rank: pipeline(plan=pipex.build(("1f1b", "gpipe")[rank], 2, 2)), ["plan", "1f1b", "gpipe"]),
        (lambda rank: pipeline(plan=pipex.build("1f1b", 2, 2 + rank)), ["micro-batches", "2 on rank 0, 3 on rank 1"]),
        (lambda rank: pipeline(clip_norm=(None, 1.0)[rank]), ["clip_norm", "None on rank 0, 1.0 on rank 1"]),
        (lambda rank: pipeline(seed=rank), ["seed", "0 on rank 0, 1 on rank 1"]),
        (lambda rank: pipeline(optimizer=(sgd, None)[rank]), ["optimizer", "True on rank 0, False on rank 1"]),
        (lambda rank: step(pipeline(), samples=4 + 2 * rank), ["batch", "[4, 4]", "[6, 4]"]),
        (lambda rank: step(pipeline(), dtype=(torch.float32, torch.float64)[rank]), ["batch", "float32", "float64"]),
        (lambda rank: (step if rank else evaluate)(pipeline()), ["the call", "evaluate", "step"]),
    ],
    ids=["plan", "microbatches", "clip_norm", "seed", "optimizer", "batch", "dtype", "calls"],
)
def test_ranks_that_disagree_are_told_both_values(
    errors: Callable[..., list[str]], body: Callable[[int], object], shown: list[str]
) -> None:
    begin = time.monotonic()
    for text in errors(body):
        assert text.startswith("ConfigMismatch: the ranks disagree about " + shown[0]), text
        assert [part for part in shown if part not in text] == []
    assert time.monotonic() - begin < 2.0


def test_ranks_that_take_different_numbers_of_steps_are_told_so(errors: Callable[..., list[str]]) -> None:
    def body(rank: int) -> None:
        pipe = pipeline()
        for _ in range(1 + rank):
            step(pipe)

    assert any(text.startswith("ConfigMismatch: ") for text in errors(body))


def evaluate(pipe: pipex.Pipeline) -> float:
    return pipe.evaluate(torch.ones(4, 4), torch.ones(4, 4))


class Moody(nn.Module):
    """A stage that returns ``change(output)`` for one micro-batch."""

    def __init__(self, change: Callable[[Tensor], Any], at_forward: int) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(4, 4), change
        self.forwards, self.at_forward = 0, at_forward

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        if torch.is_grad_enabled():
            self.forwards += 1
            if self.forwards == self.at_forward:
                return self.change(y)
        return y


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda y: y[:1], "UserWarning: Using a target size (torch.Size([2, 4])) that is different to the input size"),
        (lambda y: y.double(), "RuntimeError: mat1 and mat2 must have the same dtype"),
        (lambda y: y.t(), "RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x2 and 4x4)"),
        (lambda y: (y, y), "TypeError: Linear.forward() takes 2 positional arguments but 3 were given"),
    ],
    ids=["fewer", "wider", "transposed", "two"],
)
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("at_forward", [2, 3])
def test_what_a_stage_cannot_take_is_its_own_error(
    errors: Callable[..., list[str]], change: Callable[[Tensor], Any], error: str, at_forward: int
) -> None:
    def body(rank: int) -> None:
        pipe = pipeline([Moody(change, at_forward), nn.Linear(4, 4)])
        for _ in range(2):
            step(pipe)

    sender, receiver = errors(body)
    assert receiver.startswith(error), receiver
    assert sender.startswith(f"PeerFailed: rank 1 failed: {error[:40]}"), sender
    assert f"step {1 + (at_forward - 1) // 2}, stage 1, action 1F{(at_forward - 1) % 2}" in sender, sender


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda y: y.to_sparse(), ["UnsupportedModule", "stage 0", "got a torch.sparse_coo tensor"]),
        (lambda y: y.tolist(), ["UnsupportedModule", "stage 0", "got list"]),
    ],
    ids=["sparse", "list"],
)
def test_an_output_that_is_no_message_is_named_at_the_sender(
    errors: Callable[..., list[str]], change: Callable[[Tensor], Any], shown: list[str]
) -> None:
    sender, receiver = errors(lambda rank: step(pipeline([Moody(change, 2), nn.Linear(4, 4)])))
    assert [part for part in shown if part not in sender] == []
    assert receiver.startswith(f"PeerFailed: rank 0 failed: {shown[0]}: ")


# Arguments.


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (lambda rank: pipeline(linears(3)), ["the plan is for another number of stages; got 3 stages; needed 2"]),
        (lambda rank: pipeline(plan=pipex.build("1f1b", 3, 2)), ["number of ranks; got a plan for 3; needed 2"]),
        (lambda rank: step(pipeline(), samples=1), ["1 samples for 2 micro-batches"]),
        (lambda rank: step(pipeline(optimizer=None)), ["this pipeline cannot train; got no optimizer"]),
        (lambda rank: pipeline(loss=nn.Linear(1, 1)), ["loss_fn has parameters"]),
        (lambda rank: pipeline().step(torch.ones(4, 4), torch.ones(6, 4)), ["4 and 6 samples"]),
        (lambda rank: pipeline().step(torch.tensor(1.0), torch.ones(4, 4)), ["dimension 0"]),
        (lambda rank: pipeline().step([1, 2], torch.ones(4, 4)), ["a list of ready micro-batches"]),
        (lambda rank: pipeline().step((), torch.ones(4, 4)), ["nothing in the batch can be cut", "got ()"]),
    ],
)  # fmt: skip
def test_an_argument_that_cannot_be_used(
    errors: Callable[..., list[str]], body: Callable[[int], object], shown: list[str]
) -> None:
    found = errors(body)
    assert any(text.startswith("InputError: ") for text in found), found
    for text in found:
        assert text.startswith(("InputError: ", "PeerFailed: ")), text
        assert "InputError: " in text
        assert [part for part in shown if part not in text] == []


@pytest.mark.parametrize("loss", [lambda y, t: (y - t) ** 2, lambda y, t: 0.5], ids=["vector", "float"])
def test_a_loss_that_is_no_scalar_is_named_on_the_last_rank(errors: Callable[..., list[str]], loss: Any) -> None:
    first, last = errors(lambda rank: step(pipeline(loss=loss)))
    assert last.startswith(
        "InputError: the loss function must return the mean loss of a micro-batch, or its sum and count; got "
    )
    assert first.startswith("PeerFailed: rank 1 failed: InputError: the loss function must")


def test_a_pipeline_that_has_failed_is_not_used_again(errors: Callable[..., list[str]]) -> None:
    def body(rank: int) -> None:
        pipe = pipeline(loss=lambda y, t: 0.5)
        with pytest.raises(PipexError):
            step(pipe)
        step(pipe)

    for text in errors(body):
        assert text.startswith("PipexError: this pipeline has failed before (")


def test_no_memory_for_the_ring(errors: Callable[..., list[str]]) -> None:
    """The kernel's own limit on the size of a file, which a memfd is, stands in for a machine without free memory."""

    def body(rank: int) -> None:
        pipe = pipeline()
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
        step(pipe, samples=400)

    first, second = errors(body)
    assert second.startswith("OutOfSharedMemory: shared memory between ranks cannot be allocated; got File too large")
    assert first.startswith("PeerFailed: rank 1 failed: OutOfSharedMemory: ")


def test_more_stages_than_layers() -> None:
    with pytest.raises(InputError, match="a model of 3 layers cannot be cut into 4 stages; needed 1 to 3"):
        pipex.split_model(nn.Sequential(*linears(3)), 4)


def test_no_microbatches() -> None:
    with pytest.raises(PlanError, match="too few micro-batches for 1f1b; got 0; needed at least 1"):
        pipex.build("1f1b", 4, 0)


def test_an_unknown_schedule_lists_the_known() -> None:
    with pytest.raises(PlanError, match="got '2f2b'; needed one of naive, gpipe, 1f1b, interleaved"):
        pipex.build("2f2b", 4, 4)


def test_uneven_microbatches_work(tmp_path: Path) -> None:
    losses = pipex.launch(lambda: step(pipeline(plan=pipex.build("zb-h1", 2, 3)), samples=7), 2)
    assert losses[0] == losses[1]


# The command line.


SIZES = {"ranks": 2, "microbatches": 2, "batch": 4, "context": 8, "width": 8, "heads": 2, "layers": 2, "steps": 1}
SMALL = [f"--{name}={value}" for name, value in SIZES.items()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--microbatches", "0"], "InputError: --microbatches is out of range; got 0; needed at least 1"),
        (["--ranks", "9"], "InputError: a model of 4 layers cannot be cut into 9 stages; needed 1 to 4"),
        (["--batch", "1"], "InputError: the batch is too small for the plan; got --batch 1 for --microbatches 2"),
        (
            ["--schedule", "2f2b"],
            "PlanError: unknown schedule; got '2f2b'; needed one of naive, gpipe, 1f1b, interleaved",
        ),
        (["--heads", "3"], "InputError: the model's width cannot be divided among its heads; got width 8, 3 heads"),
        (["--lr", "nan"], "InputError: --lr is out of range; got nan; needed a number above 0"),
        (["--resume", "missing"], "CheckpointError: there is no checkpoint in missing"),
        (["missing.txt"], "InputError: missing.txt cannot be read: No such file or directory"),
        (["empty.txt"], "InputError: empty.txt is empty"),
        (["binary.txt"], "InputError: binary.txt is not a text file; got byte 0xff at offset 0"),
        (["short.txt"], "InputError: the text is too short; got 3 bytes; needed at least 9"),
        (["unreadable.txt"], "InputError: unreadable.txt cannot be read"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(b"\xff\x00" * 100)
    Path("short.txt").write_text("abc")
    os.symlink("unreadable.txt", "unreadable.txt")  # a loop: unreadable for every user
    assert cli.main(["train", *SMALL, *arguments]) == 1
    said = capfd.readouterr()
    assert message in said.err
    assert said.err.splitlines()[-1].startswith("pipex train: ")
    assert said.out == ""


def test_a_checkpoint_of_another_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = str(tmp_path / "checkpoint")
    assert cli.main(["train", *SMALL, "--save", directory]) == 0
    assert cli.main(["train", *SMALL, "--steps", "2", "--width", "16", "--resume", directory]) == 1
    said = capfd.readouterr().err
    assert "CheckpointError: " in said
    assert "[256, 8]" in said
    assert "[256, 16]" in said
    # One of another number of ranks loads.
    assert cli.main(["train", *SMALL, "--steps", "2", "--ranks", "3", "--resume", directory, "--check", "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["identical"] is True
