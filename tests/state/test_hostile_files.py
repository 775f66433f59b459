"""Whatever stands in a checkpoint's files, checksums and all: it is loaded, or refused by name before anything has
changed, and the pipeline goes on."""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SEED, case
from mutated import mutate
from torch import Tensor, nn

import pipex
from pipex.errors import CheckpointError

LOSS = nn.functional.mse_loss


class Training:
    """A pipeline of one rank, and a scheduler."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        plan = pipex.build("gpipe", 1, microbatches=2)
        self.pipeline = pipex.Pipeline(pipex.split_model(model, 1), plan, LOSS, optimizer=torch.optim.AdamW)
        assert self.pipeline.optimizer is not None
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.pipeline.optimizer, [1, 3])

    def step(self) -> float:
        loss = self.pipeline.step(torch.linspace(-1, 1, 16).view(4, 4), torch.ones(4, 2))
        self.scheduler.step()
        return loss

    def save(self, directory: Path) -> None:
        self.pipeline.save(directory, {"note": [1, {"a": None}]}, state={"scheduler": self.scheduler})

    def load(self, directory: Path) -> None:
        self.pipeline.load(directory, state={"scheduler": self.scheduler})

    def everything(self) -> Any:
        """All that a load changes, to be compared."""
        optimizer = self.pipeline.optimizer
        assert optimizer is not None
        tensors = {
            name: tensor.tolist() for stage in self.pipeline.local_stages for name, tensor in stage.names.items()
        }
        return [self.pipeline.steps, tensors, _plain(optimizer.state_dict()), self.scheduler.state_dict()]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


class Saved:
    """A good checkpoint in a directory, its files as bytes, and a pipeline that has gone on from before it."""

    def __init__(self, directory: Path) -> None:
        trained = Training()
        trained.step()
        trained.save(directory)
        self.everything = trained.everything()
        self.following = [trained.step() for _ in range(2)]
        self.directory, self.manifest = directory, directory / "checkpoint.json"
        (self.shard,) = directory.glob("*.safetensors")
        self.content = {path: path.read_bytes() for path in (self.manifest, self.shard)}
        self.training = Training()

    def checkpoint(self) -> Any:
        return json.loads(self.content[self.manifest])["checkpoint"]

    def write(self, checkpoint: Any) -> None:
        """With the checksum that belongs to it."""
        outer = {"format": "pipex checkpoint 1", "crc32": zlib.crc32(json.dumps(checkpoint).encode())}
        self.manifest.write_text(json.dumps({**outer, "checkpoint": checkpoint}))

    def attempt(self) -> str | None:
        """Loads; the words of the refusal, after which nothing has changed."""
        before = self.training.everything()
        try:
            self.training.load(self.directory)
        except CheckpointError as error:
            if "MultiStepLR does not take the state" in str(error):
                self.training = Training()  # only the scheduler could find that out
            else:
                assert self.training.everything() == before, "a refused load has changed something"
            return str(error)
        finally:
            for path, content in self.content.items():
                path.write_bytes(content)
        return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(autouse=True)
def _the_good_one_still_loads(saved: Saved) -> Iterator[None]:
    yield
    assert saved.attempt() is None
    assert saved.training.everything() == saved.everything
    assert [saved.training.step() for _ in range(2)] == saved.following


# Random changes.

JUNK: list[Any] = [
    {"tensor": 0}, {"tensor": 10**9}, {"tuple": 3}, {"dict": [[[], 1]]}, {"Counter": "ab"}, {"params": []},
    "../outside", "/etc/passwd", "step00000001-rank0000-00000000.safetensors", "optimizer/0.weight",
]  # fmt: skip


def with_structure_changed(rng: random.Random, saved: Saved) -> None:
    checkpoint = saved.checkpoint()
    mutate(rng, checkpoint, JUNK)
    saved.write(checkpoint)


def with_bytes_changed(rng: random.Random, saved: Saved, path: Path, last: int | None = None) -> None:
    data = bytearray(saved.content[path])
    for _ in range(rng.choice((1, 1, 2, 5))):
        begin = rng.randint(0, len(data) if last is None else last)
        end = min(len(data), begin + rng.choice((0, 1, 1, 8, 100)))
        new = rng.choice(
            [b"", rng.randbytes(end - begin), rng.randbytes(3), bytes(data[begin:end]) * 3, b"[" * 3000, b"9"]
        )
        data[begin:end] = (
            new if rng.random() < 0.7 else bytes([data[begin] ^ 1 << rng.randrange(8)] if data[begin:] else b"")
        )
    path.write_bytes(data)


def with_a_shard_changed(rng: random.Random, saved: Saved) -> None:
    """Mostly in its header, and the manifest says so."""
    length = 8 + int.from_bytes(saved.content[saved.shard][:8], "little")
    with_bytes_changed(rng, saved, saved.shard, length if rng.random() < 0.8 else None)
    checkpoint = saved.checkpoint()
    data = saved.shard.read_bytes()
    checkpoint["shards"][0] |= {"bytes": len(data), "crc32": zlib.crc32(data)}
    saved.write(checkpoint)


CHANGES: dict[str, Callable[[random.Random, Saved], None]] = {
    "structure": with_structure_changed,
    "bytes": lambda rng, saved: with_bytes_changed(rng, saved, saved.manifest),
    "shard": with_a_shard_changed,
}
MANY = 1000  # of each


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "numbers",
    [pytest.param(range(100), id="some"), pytest.param(range(100, MANY), id="all", marks=pytest.mark.nightly)],
)
def test_what_is_changed_is_refused_by_name_or_harmless(saved: Saved, change: str, numbers: range) -> None:
    refused = 0
    for number in numbers:
        CHANGES[change](random.Random(f"{SEED} {change} {number}"), saved)
        with case(change, number):
            if saved.attempt() is not None:
                refused += 1
            else:
                saved.training = Training()  # a scheduler, for one, takes whatever it is given
    assert refused > len(numbers) / 2  # what is changed within meta, and in no shape that matters, is loaded


# Each check of the structure, by its words.


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def at(*path: Any) -> Callable[[Any], Any]:
    """Changes the value there into the last of the arguments."""
    *way, last, new = path

    def change(checkpoint: Any) -> Any:
        inner = checkpoint
        for key in way:
            inner = inner[key]
        inner[last] = new
        return checkpoint

    return change


RECORD = ("shards", 0, "meta", "optimizer/0.weight")
SCHEDULER = ("shards", 0, "meta", "state/0/scheduler")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda checkpoint: [checkpoint], "checkpoint of the file is [{'step': 1"),
        (lambda checkpoint: {**checkpoint, "more": 1}, "checkpoint is no object of step, shards, meta"),
        (at("step", -1), "step -1, which is not from 0 to 2147483647"),
        (at("step", 2**31), "step 2147483648, which is not from"),
        (at("step", 2**70), "step 1180591620717411303424, which is not from"),
        (at("step", True), "step of checkpoint is True, no int"),
        (at("step", 1.0), "step of checkpoint is 1.0, no int"),
        (at("step", "1"), "step of checkpoint is '1', no int"),
        (at("step", None), "step of checkpoint is None, no int"),
        (at("meta", [1]), "meta of checkpoint is [1], no dict"),
        (at("meta", {}), "was not saved by a pipeline"),
        (at("meta", "pipex", "x"), "was not saved by a pipeline"),
        (at("meta", "pipex", {"deep": nested(100)}), "lists and objects more than 100 deep"),
        (at("shards", {}), "shards of checkpoint is {}, no list"),
        (at("shards", []), "0 shards in 0 files"),
        (at("shards", ["a"]), "shard 0 is no object of file, bytes, crc32, tensors, meta"),
        (lambda checkpoint: {**checkpoint, "shards": checkpoint["shards"] * 2}, "2 shards in 1 files"),
        (at("shards", 0, "file", 5), "file of shard 0 is 5, no str"),
        (at("shards", 0, "file", "../step00000001-rank0000-00000000.safetensors"), "is damaged; got a shard '../step0"),
        (at("shards", 0, "file", "a" * 10_000), "is damaged; got a shard 'aaa"),
        (at("shards", 0, "file", "step00000001-rank0000-00000000.safetensors\n"), "is damaged; got a shard 'step"),
        (at("shards", 0, "bytes", -1), "bytes -1 of shard 0"),
        (at("shards", 0, "bytes", 1 << 63), "bytes 9223372036854775808 of shard 0"),
        (at("shards", 0, "crc32", 1 << 32), "crc32 4294967296 of shard 0"),
        (at("shards", 0, "crc32", float("nan")), "crc32 of shard 0 is nan, no int"),
        (at("shards", 0, "tensors", []), "tensors of shard 0 is [], no dict"),
        (at("shards", 0, "tensors", "model/0.weight", 3), "3 as the form of 'model/0.weight' in shard 0"),
        (at("shards", 0, "tensors", "model/0.weight", "int32[8, 4]"), "0.weight is int32[8, 4], needed float32[8, 4]"),
        (at("shards", 0, "meta", "x"), "meta of shard 0 is 'x', no dict"),
        (at(*RECORD, None), "the optimizer state of 0.weight in"),
        (at(*RECORD, "class", 1), "the optimizer state of 0.weight in"),
        (at(*RECORD, "class", "SGD"), "was saved by another optimizer; got SGD; needed AdamW"),
        (at(*RECORD, "tensors", "abc"), "the optimizer state of 0.weight in"),
        (at(*RECORD, "tensors", [1]), "the optimizer state of 0.weight in"),
        (at(*RECORD, "tensors", ["none"]), "does not hold optimizer/0.weight/none"),
        (at(*RECORD, "values", [1]), "the optimizer state of 0.weight in"),
        (at(*RECORD, "values", {"a": {}}), "the optimizer state of 0.weight in"),
        (at(*RECORD, "options", [1]), "the optimizer state of 0.weight in"),
        (at(*RECORD, "options", "params", []), "the optimizer state of 0.weight in"),
        (at(*SCHEDULER, {"tensor": 0}), "does not hold state/0/scheduler/0"),
        (at(*SCHEDULER, {"set": [1]}), "the state 'scheduler' in"),
        (at(*SCHEDULER, {"dict": [1]}), "the state 'scheduler' in"),
        (at(*SCHEDULER, {"dict": [[[], 1]]}), "the state 'scheduler' in"),
        (at(*SCHEDULER, {"dict": [], "tuple": []}), "the state 'scheduler' in"),
        (at(*SCHEDULER, {"tuple": None}), "the state 'scheduler' in"),
    ],
)  # fmt: skip
def test_a_manifest_of_another_structure_is_named(saved: Saved, change: Callable[[Any], Any], said: str) -> None:
    saved.write(change(saved.checkpoint()))
    refusal = saved.attempt()
    assert refusal is not None
    assert said in refusal
    assert len(refusal) < 600


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", "fast"), ("lr", None), ("lr", True), ("betas", [0.9]), ("betas", 0.9), ("betas", ["a", "b"]),
     ("eps", [1]), ("foreach", [1]), ("maximize", 1)],
)  # fmt: skip
def test_a_hyperparameter_of_another_kind_is_named(saved: Saved, key: str, value: Any) -> None:
    checkpoint = saved.checkpoint()
    for name, record in checkpoint["shards"][0]["meta"].items():
        if name.startswith("optimizer/"):
            record["options"][key] = value
    saved.write(checkpoint)
    refusal = saved.attempt()
    assert refusal is not None
    assert re.search(rf"{key} of the optimizer in .* cannot be used; got {re.escape(repr(value))}; needed", refusal)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "Expecting value"),
        (b"null", "another format"),
        (b"[1]", "another format"),
        (b"[" * 100_000, "recursion"),
        (b'{"a":' * 100_000, "recursion"),
        (b"9" * 100_000, "digits"),
        (b"\xff\xfe\xff", "decode"),
        (b'{"format": "pipex checkpoint 1"}', "the file is no object of format, crc32, checkpoint"),
        (b'{"format": "pipex checkpoint 1", "crc32": NaN, "checkpoint": {}}', "crc32 of the file is nan, no int"),
        (b'{"format": "pipex checkpoint 1", "crc32": 1, "checkpoint": {}}', "another checksum than it says"),
    ],
)
def test_a_file_that_is_no_manifest_is_named(saved: Saved, text: bytes, said: str) -> None:
    saved.manifest.write_bytes(text)
    refusal = saved.attempt()
    assert refusal is not None
    assert f"{saved.manifest} cannot be read as the manifest of a checkpoint; got " in refusal
    assert said in refusal
