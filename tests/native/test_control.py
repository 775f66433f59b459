"""The shared memory of a run: anonymous, sealed, and opened only by who was told where it is."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import stat
import struct

import pytest

from pipex import _native
from pipex.errors import ConfigMismatch, InputError

ADDRESS = struct.Struct("<iiQ16s")  # process, descriptor, start time, nonce
VERSION_OFFSET = 128  # of the control page, after the segment's own header


@pytest.mark.timing  # no other process may come or go
def test_memory_is_sealed_private_and_nameless() -> None:
    names = os.listdir("/dev/shm")
    control = _native.Control(2)
    status = os.fstat(control.fd)
    assert fcntl.fcntl(control.fd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert fcntl.fcntl(control.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    for size in (0, status.st_size + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(control.fd, size)
    assert status.st_blocks * 512 >= status.st_size  # really allocated: no access can fail later
    assert os.listdir("/dev/shm") == names
    assert os.readlink(f"/proc/self/fd/{control.fd}").endswith("(deleted)")


def test_two_controls_share_one_page() -> None:
    first = _native.Control(3)
    second = _native.Control.attach(os.dup(first.fd))
    third = _native.Control.open(first.address)
    first.lost(1, "is gone: test")
    for control in (second, third):
        assert control.ranks == 3
        assert control.aborted
        with pytest.raises(_native.Aborted) as caught:
            control.raise_if_aborted()
        assert caught.value.args == ("lost", 1, 0, -1, "is gone: test")


def test_long_and_foreign_text_is_cut_without_harm() -> None:
    control = _native.Control(1)
    control.lost(0, "é" * 1000)
    with pytest.raises(_native.Aborted) as caught:
        control.raise_if_aborted()
    assert caught.value.args[4].rstrip("\N{REPLACEMENT CHARACTER}") == "é" * 255


@pytest.mark.parametrize("ranks", [-1, 0, 5000])
def test_an_impossible_number_of_ranks_is_refused(ranks: int) -> None:
    with pytest.raises(InputError, match=f"got {ranks}; needed 1 to 4096"):
        _native.Control(ranks)


def test_descriptors_that_are_no_segment_are_refused_and_closed() -> None:
    unsealed = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 8192)
    foreign = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.ftruncate(foreign, 8192)
    fcntl.fcntl(foreign, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    reader, writer = os.pipe()
    for fd in (unsealed, foreign, reader):
        with pytest.raises(InputError, match="not shared memory of a running pipex process"):
            _native.Control.attach(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    os.close(writer)
    with pytest.raises(InputError):
        _native.Control.attach(-1)


@pytest.mark.parametrize("changed", ["process", "descriptor", "start", "nonce", "length"])
def test_an_address_is_checked_in_every_part(changed: str) -> None:
    control = _native.Control(1)
    process, descriptor, start, nonce = ADDRESS.unpack(control.address)
    wrong = {
        "process": ADDRESS.pack(2**31 - 1, descriptor, start, nonce),
        "descriptor": ADDRESS.pack(process, 0, start, nonce),
        "start": ADDRESS.pack(process, descriptor, start + 1, nonce),
        "nonce": ADDRESS.pack(process, descriptor, start, bytes(16)),
        "length": control.address[:-1],
    }[changed]
    with pytest.raises(InputError) as caught:
        _native.Control.open(wrong)
    assert nonce.hex() not in str(caught.value)


def test_a_closed_descriptor_can_no_longer_be_opened() -> None:
    control = _native.Control(1)
    address = control.address
    control.close_descriptor()
    with pytest.raises(InputError, match="cannot be opened"):
        _native.Control.open(address)


@pytest.mark.parametrize(
    ("value", "error"),
    [((1, 1), ConfigMismatch), ((3, 1), ConfigMismatch), ((2, 0), InputError), ((2, 4000), InputError)],
)
def test_a_page_of_another_version_or_size_is_refused(value: tuple[int, int], error: type[Exception]) -> None:
    control = _native.Control(1)
    with mmap.mmap(control.fd, 0) as memory:
        memory[VERSION_OFFSET : VERSION_OFFSET + 8] = struct.pack("<II", *value)
    with pytest.raises(error):
        _native.Control.attach(os.dup(control.fd))


def test_a_member_frees_its_thread_when_it_is_dropped_without_leaving() -> None:
    before = len(os.listdir("/proc/self/task"))
    member = _native.Member(_native.Control(1), 0, 1.0, False)
    assert len(os.listdir("/proc/self/task")) == before + 1
    del member
    gc.collect()
    assert len(os.listdir("/proc/self/task")) == before
