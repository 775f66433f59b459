"""What was saved is what is loaded, and damage is found."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from few_descriptors import descriptors
from torch import Tensor

from pipex.errors import CheckpointError
from pipex.state import serialize
from pipex.state.checkpoint import Checkpoint
from pipex.state.manifest import MANIFEST
from pipex.state.save import commit, discard, write_shard


def shards_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


Save = Callable[..., None]
TensorsOf = Callable[..., dict[str, Tensor]]

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
    torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def odd_tensors() -> dict[str, Tensor]:
    """Every dtype and shape that could go wrong."""
    base = torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(0))
    tensors = {f"{dtype}": base.to(dtype) for dtype in DTYPES}
    row = torch.arange(12.0)
    pairs = torch.complex(row[:6], row[6:]).view(2, 3)
    return tensors | {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "transposed": row.view(3, 4).t(),
        "slice": row[2:5],
        "same memory": row[2:5],
        "expanded": row[:3].expand(4, 3),
        "every other, backwards": row.flip(0)[::2],
        "conjugate": pairs.conj(),
        "conjugate and transposed": pairs.t().conj(),
        "negative": pairs.conj().imag,
        "negative, one element": torch.tensor([1 + 1j]).conj().imag,
        "negative, on a slice": pairs.conj().imag[:, 1:2],
        "not a number": torch.tensor([float("nan"), -0.0, float("inf")]),
        'ein Name, der nicht ascii ist: ß/"\\': torch.ones(1),
    }


def assert_same(read: Tensor, saved: Tensor, name: str) -> None:
    assert (read.dtype, read.shape) == (saved.dtype, saved.shape), name
    assert list(map(repr, read.reshape(-1).tolist())) == list(map(repr, saved.reshape(-1).tolist())), name
    if not saved.is_neg() and not saved.is_conj():  # the bytes in memory are then those of the values
        assert torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (read, saved))), name


def test_a_shard_is_a_file_that_the_safetensors_package_reads(tmp_path: Path) -> None:
    tensors = odd_tensors()
    shard = write_shard(tmp_path, 1, 0, tensors, {})
    read = safetensors.torch.load_file(tmp_path / shard["file"])
    assert read.keys() == tensors.keys() == shard["tensors"].keys()
    for name, tensor in tensors.items():
        assert_same(read[name], tensor, name)
    assert (tmp_path / shard["file"]).stat().st_size == shard["bytes"]
    assert json.loads(json.dumps(shard)) == shard


def test_every_tensor_in_a_shard_is_aligned_to_its_element_size(tmp_path: Path) -> None:
    tensors = odd_tensors()
    raw = (tmp_path / write_shard(tmp_path, 1, 0, tensors, {})["file"]).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0, name


def test_loading_returns_the_saved_bits_in_memory_of_their_own(tmp_path: Path) -> None:
    tensors = odd_tensors()
    commit(tmp_path, 7, [write_shard(tmp_path, 7, 0, tensors, {})], {})
    loaded = Checkpoint.open(tmp_path).load(tensors)
    (path,) = shards_in(tmp_path)
    path.write_bytes(b"x" * path.stat().st_size)
    for name, tensor in tensors.items():
        assert_same(loaded[name], tensor, name)


def test_a_save_replaces_the_one_before_and_leaves_nothing_else(tmp_path: Path, save: Save, assert_holds: Save) -> None:
    for step, ranks in ((1, 3), (2, 2), (2, 2), (3, 4)):
        save(tmp_path, step, ranks)
        assert_holds(tmp_path, step, ranks)
        assert len(shards_in(tmp_path)) == ranks == len(list(tmp_path.iterdir())) - 1


def test_files_that_are_not_shards_stay(tmp_path: Path, save: Save) -> None:
    other = [tmp_path / "model.safetensors", tmp_path / "notes.txt"]
    for file in other:
        file.write_text("mine")
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert [file.read_text() for file in other] == ["mine", "mine"]


def test_only_the_shards_that_hold_a_wanted_tensor_are_read(tmp_path: Path, save: Save, tensors_of: TensorsOf) -> None:
    save(tmp_path, 1)
    rank1 = shards_in(tmp_path)[1]
    rank1.write_bytes(bytes(rank1.stat().st_size))
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.load(["large0"])["large0"], tensors_of(1, 0)["large0"])
    with pytest.raises(CheckpointError, match=rf"{rank1.name} is damaged; got checksum"):
        checkpoint.load(["large1"])


def test_a_tensor_in_two_shards_is_read_once_and_must_have_one_form(tmp_path: Path) -> None:
    shared = torch.randn(3)
    shards = [write_shard(tmp_path, 1, rank, {"shared": shared}, {"x": 1}) for rank in range(2)]
    commit(tmp_path, 1, shards, {})
    assert torch.equal(Checkpoint.open(tmp_path).load(["shared"])["shared"], shared)

    shards = [write_shard(tmp_path, 2, rank, {"shared": torch.zeros(3 + rank)}, {}) for rank in range(2)]
    with pytest.raises(CheckpointError, match=r"different things as shared; got float32\[4\] and float32\[3\]"):
        commit(tmp_path, 2, shards, {})
    shards = [write_shard(tmp_path, 2, rank, {}, {"x": rank}) for rank in range(2)]
    with pytest.raises(CheckpointError, match="different things as x; got 1 and 0"):
        commit(tmp_path, 2, shards, {})
    discard(tmp_path, shards)
    assert Checkpoint.open(tmp_path).step == 1


@pytest.mark.parametrize(
    ("tensor", "got"),
    [
        (torch.zeros(2, dtype=torch.complex128), "complex128[2]"),
        (torch.zeros(2, dtype=torch.uint8).view(torch.float8_e8m0fnu), "float8_e8m0fnu[2]"),
        (torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2[2]"),
        (torch.eye(2).to_sparse(), "float32[2, 2], torch.sparse_coo"),
        (torch.empty(2, device="meta"), "float32[2], torch.strided, on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_could_not_be_read_back_is_named(tmp_path: Path, tensor: Tensor, got: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"the tensor odd cannot be saved; got {got}")):
        write_shard(tmp_path, 1, 0, {"fine": torch.ones(1), "odd": tensor}, {})
    assert list(tmp_path.iterdir()) == []


def test_all_types_are_those_that_the_installed_package_knows() -> None:
    known = safetensors.torch._TYPES  # type: ignore[attr-defined]
    assert {name: dtype for dtype, name in serialize.DTYPES.items()} == known
    assert set(DTYPES) == set(serialize.DTYPES)


def test_a_type_that_an_older_package_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serialize.DTYPES, torch.complex128, "C128")
    serialize._is_read_back.cache_clear()
    with pytest.raises(CheckpointError, match=r"the tensor a cannot be saved; got complex128\[1\].*, complex64, "):
        write_shard(tmp_path, 1, 0, {"a": torch.zeros(1, dtype=torch.complex128)}, {})
    serialize._is_read_back.cache_clear()


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_the_default_device_is_nothing_to_a_save(tmp_path: Path, save: Save, assert_holds: Save, device: str) -> None:
    serialize._is_read_back.cache_clear()
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        for dtype in serialize.DTYPES:
            assert serialize._is_read_back(dtype)
    finally:
        torch.set_default_device(before)
    save(tmp_path, 1)
    assert_holds(tmp_path, 1)


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_a_save_without_a_descriptor_left_is_told_so_and_the_next_one_goes_on(
    tmp_path: Path, save: Save, assert_holds: Save, spare: int
) -> None:
    serialize._is_read_back.cache_clear()
    message = "cannot try whether a tensor of torch.float32 can be read back; got .*; needed .*file descriptors"
    with pytest.raises(CheckpointError, match=message), descriptors(spare):
        save(tmp_path, 1)
    save(tmp_path, 1)
    assert_holds(tmp_path, 1)


def test_a_directory_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path / 'none'}"):
        Checkpoint.open(tmp_path / "none")
    write_shard(tmp_path, 1, 0, {"a": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Checkpoint.open(tmp_path)


def test_a_name_that_was_not_saved_is_named(tmp_path: Path, save: Save) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"does not hold a, b, c, d, \.\.\. \(6 in all\)"):
        Checkpoint.open(tmp_path).load([*"abcdef", "large0"])


def test_a_truncated_or_missing_shard_is_found_when_the_checkpoint_is_opened(tmp_path: Path, save: Save) -> None:
    save(tmp_path, 1)
    path = shards_in(tmp_path)[1]
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged; got {size - 1} bytes; needed {size} bytes"):
        Checkpoint.open(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged; got no such file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("where", [0, 3, 9, 0.5, -1], ids=["length", "length high", "header", "data", "last byte"])
def test_one_flipped_bit_in_a_shard_is_found(tmp_path: Path, where: float, save: Save) -> None:
    save(tmp_path, 1, ranks=1)
    (path,) = shards_in(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[int(where * len(raw)) if where == 0.5 else int(where)] ^= 16
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged; got checksum"):
        Checkpoint.open(tmp_path).load(["large0"])


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[: len(text) // 2], lambda text: text.replace('"lr": 0.1', '"lr": 0.2'), lambda text: "[]"],
    ids=["truncated", "changed", "other JSON"],
)
def test_a_damaged_manifest_is_named_and_nothing_is_deleted(
    tmp_path: Path, damage: Callable[[str], str], save: Save, tensors_of: TensorsOf
) -> None:
    save(tmp_path, 1)
    manifest = tmp_path / MANIFEST
    manifest.write_text(damage(manifest.read_text()))
    with pytest.raises(CheckpointError, match=f"{manifest} cannot be read as the manifest"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=f"{manifest} cannot be read as the manifest"):
        write_shard(tmp_path, 2, 0, tensors_of(2, 0), {})
    assert len(shards_in(tmp_path)) == 2
