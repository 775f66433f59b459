"""A load that fails has changed nothing on any rank, says the same on all, and the pipeline goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import host_world
import pytest

from pipex.errors import CheckpointError
from pipex.state import Checkpoint
from tests.runtime.test_pipeline import data, pipeline, save_and_go_on

RANKS = 2


def trained(_: str) -> list[float]:
    pipe = pipeline()
    return [pipe.step(*data(8, step)) for step in range(2)]


def load_in_vain(directory: str) -> Any:
    """One step, a load that fails, and another."""
    pipe = pipeline()
    losses = [pipe.step(*data(8, 0))]
    before = [tensor.tolist() for stage in pipe.local_stages for tensor in stage.names.values()]
    with pytest.raises(CheckpointError) as caught:
        pipe.load(directory)
    assert pipe.steps == 1
    assert [tensor.tolist() for stage in pipe.local_stages for tensor in stage.names.values()] == before
    return str(caught.value), [*losses, pipe.step(*data(8, 1))]


def check(directory: Path, *words: str) -> None:
    expected = host_world.launch(trained, RANKS, args=("",))[0]
    said = set()
    for text, losses in host_world.launch(load_in_vain, RANKS, args=(str(directory),)):
        assert losses == expected
        said.add(text)
    (text,) = said
    for word in words:
        assert word in text


def test_without_a_checkpoint_one_starts_fresh(tmp_path: Path) -> None:
    check(tmp_path, f"there is no checkpoint in {tmp_path}; check the path, or start without one")


@pytest.mark.parametrize("damaged", range(RANKS))
def test_damage_that_one_rank_finds_is_said_by_all(damaged: int, tmp_path: Path) -> None:
    host_world.launch(save_and_go_on, RANKS, args=(str(tmp_path),))
    (shard,) = tmp_path.glob(f"*rank000{damaged}*")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    check(tmp_path, f"rank {damaged}: {shard} is damaged; got checksum")


def test_damage_that_all_find_is_said_once(tmp_path: Path) -> None:
    host_world.launch(save_and_go_on, RANKS, args=(str(tmp_path),))
    (shard,) = tmp_path.glob("*rank0001*")
    os.truncate(shard, 5)
    check(tmp_path, f"{shard} is damaged; got 5 bytes")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    check(tmp_path, str(caught.value))


def load_each_its_own(root: str) -> str:
    pipe = pipeline()
    with pytest.raises(CheckpointError) as caught:
        pipe.load(Path(root, str(pipe.world.rank)))
    pipe.step(*data(8, 0))
    return str(caught.value)


def test_ranks_that_find_different_checkpoints_load_none(tmp_path: Path) -> None:
    for rank in range(RANKS):
        host_world.launch(save_and_go_on, RANKS, args=(str(tmp_path / str(rank)),))
    said = host_world.launch(load_each_its_own, RANKS, args=(str(tmp_path),))
    assert all("the ranks find different checkpoints in" in text and "got step 3 (step0000" in text for text in said)


@pytest.mark.parametrize("meta", [{"a": {1, 2}}, {"a": object()}, {"a": [[[[]]]] * 3, "b": b"x"}, "text", 3])
def test_meta_that_json_cannot_hold_is_named_and_the_pipeline_goes_on(meta: Any, tmp_path: Path) -> None:
    pipe = pipeline("gpipe")
    with pytest.raises(CheckpointError, match=r"no checkpoint was saved in .*(needed meta that JSON can hold|a dict)"):
        pipe.save(tmp_path, meta)
    assert list(tmp_path.iterdir()) == []
    pipe.save(tmp_path, {"fine": float("inf")})
    assert pipe.load(tmp_path) == {"fine": float("inf")}


def test_meta_too_deep_to_be_read_again_is_named(tmp_path: Path) -> None:
    pipe = pipeline("gpipe")
    for depth in (100, 5000):
        deep: Any = 1
        for _ in range(depth):
            deep = [deep]
        with pytest.raises(CheckpointError, match="at most 100 deep"):
            pipe.save(tmp_path, {"a": deep})
