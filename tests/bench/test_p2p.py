from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import device_world
import pytest
import torch
import torch.distributed as dist
from fake_gpu import FakeGpu
from torch import Tensor

from pipex.bench import beside, bursts, gpu, p2p
from pipex.bench.driver import Quantiles, Rounds
from pipex.bench.p2p_ends import Copies, RoundTrips
from pipex.bench.report import Row
from pipex.bench.sizes import format_size
from pipex.cli import main
from pipex.runtime import launch
from pipex.transport.host import HostSender

TINY = ["bench", "p2p", "-b", "1", "-e", "3K", "-f", "3072", "-n", "2", "-w", "1", "--json"]


def run(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    code = main(arguments)
    output = capsys.readouterr()
    return code, json.loads(output.out.splitlines()[-1]), output.err


def test_every_size_has_a_correct_row_per_provider(capsys: pytest.CaptureFixture[str]) -> None:
    code, report, _ = run(TINY, capsys)
    rows = report["rows"]
    assert code == 0
    assert [(row["case"], row["bytes"], row["provider"]) for row in rows] == [
        (case, nbytes, provider) for case, nbytes in (("1", 1), ("3K", 3072)) for provider in ("host", "gloo", "memcpy")
    ]
    assert all(row["correct"] is True and 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] for row in rows)
    assert {"cpu", "cores_allowed", "threads_per_rank", "kernel", "python", "torch", "pipex", "date"} <= set(
        report["environment"]
    )


def test_a_missed_floor_is_an_error_exit(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run([*TINY, "--min-ratio", "3K=1e9", "--min-copy-share", "1=1e9"], capsys)
    assert code == 1
    assert "pipex bench: 3K: ratio of host is " in errors
    assert "pipex bench: 1: copy_share of host is " in errors


def test_a_corrupted_payload_is_an_error_exit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = HostSender.send

    def damage_one_bit(self: HostSender, step: int, microbatch: int, tensors: Sequence[Tensor]) -> None:
        damaged = tensors[0].clone()
        damaged[-1] ^= 64
        send(self, step, microbatch, [damaged])

    monkeypatch.setattr(HostSender, "send", damage_one_bit)
    monkeypatch.setattr(
        launch, "_why_afresh", lambda device, ranks: None
    )  # ranks started afresh would not see the damage
    code, report, errors = run(TINY, capsys)
    assert code == 1
    assert [row["correct"] for row in report["rows"]] == [False, True, True] * 2
    assert [row["wrong"] for row in report["rows"]] == [6, 0, 0] * 2  # a byte in each of 3 bursts, on both ranks
    assert "pipex bench: 1: host gave a wrong result" in errors


def test_the_message_before_is_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    receive: Any = p2p.TorchReceiver.receive
    before = torch.zeros(8, dtype=torch.uint8)

    def receive_late(self: p2p.TorchReceiver, step: int, microbatch: int) -> tuple[Tensor, ...]:
        late = before.clone()
        before.copy_(receive(self, step, microbatch)[0])
        return (late,)

    monkeypatch.setattr(p2p.TorchReceiver, "receive", receive_late)
    monkeypatch.setattr(launch, "_why_afresh", lambda device, ranks: None)
    found = p2p.measure([8], Rounds(1, 0))
    assert [(row.correct, row.figures["wrong"]) for row in found] == [(True, 0), (False, 16), (True, 0)]


def test_both_ways_torch_sends_and_receives_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or NCCL would run them one after the other, and large messages wait for each other for ever."""
    batch = dist.batch_isend_irecv

    def exchange(both: list[dist.P2POp]) -> list[Any]:
        assert [one.op for one in both] == [dist.isend, dist.irecv]
        return batch(both)

    monkeypatch.setattr(dist, "batch_isend_irecv", exchange)
    monkeypatch.delattr(dist, "recv")
    monkeypatch.setattr(launch, "_why_afresh", lambda device, ranks: None)
    assert all(row.correct for row in p2p.measure([8, 1 << 20], Rounds(2, 0), both_ways=True))


def test_neighbouring_contents_differ_in_every_byte() -> None:
    noise = torch.randint(256, (64,), dtype=torch.uint8)
    messages = [torch.empty_like(noise) for _ in range(256)]
    for number, message in enumerate(messages, 1000):
        bursts.fill(message, noise, number)
    assert all(bool((messages[0] != other).all()) for other in messages[1:])


def figures(monkeypatch: pytest.MonkeyPatch, *, both_ways: bool = False, **of_rank_1: Any) -> list[Any]:
    """The rows of literal answers of both ranks."""
    samples = {"host": [1.0, 4.0, 2.0], "gloo": [40.0, 9.0, 90.0], "memcpy": [1.0, 1.0, 1.0]}
    answer = {
        "samples": samples, "sends": {"host": [3e-6, 1e-6, 2e-6], "gloo": [1e-6], "memcpy": []},
        "wrong": dict.fromkeys(samples, 0), "sms": {"host": 0, "gloo": 2, "memcpy": None},
        "slowdown": {"host": 0.01, "gloo": -0.02, "memcpy": 0.3},
    }  # fmt: skip
    other = answer | {"samples": {}, "sends": {}} | of_rank_1  # its clock does not count, its eyes do
    monkeypatch.setattr(p2p, "launch", lambda *args, **kwargs: [[answer], [other]])
    return p2p.measure([4000], Rounds(3, 0), both_ways=both_ways)


def test_figures_follow_from_the_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    host, gloo, memcpy = figures(monkeypatch, wrong={"host": 0, "gloo": 3, "memcpy": 0})
    assert (host.time.p50, host.ratio, host.correct) == (2.0, 20.0, True)
    assert host.figures == {
        "p99_us": pytest.approx(3.96), "algbw": 2.0, "busbw": 2.0, "wrong": 0, "copy_share": 0.5, "send_us": 2.0,
        "sms": 0, "gemm_slowdown": 0.01,
    }  # fmt: skip
    assert (gloo.time.p50, gloo.ratio, gloo.correct, gloo.figures["wrong"]) == (40.0, 1.0, False, 3)
    assert (memcpy.ratio, memcpy.figures["copy_share"], memcpy.figures["send_us"]) == (40.0, 1.0, None)


def test_both_ways_count_for_the_share_of_a_copy_and_one_for_the_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    host, _, memcpy = figures(monkeypatch, both_ways=True)
    assert (host.figures["algbw"], host.figures["busbw"], host.figures["copy_share"]) == (2.0, 2.0, 1.0)
    assert memcpy.figures["copy_share"] == 1.0


def test_the_rank_that_has_more_multiprocessors_and_slowdown_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"sms": {"host": 16, "gloo": None, "memcpy": 0}, "slowdown": {"host": 0.04, "gloo": -0.03, "memcpy": None}}
    host, gloo, memcpy = figures(monkeypatch, **others)
    assert (host.figures["sms"], host.figures["gemm_slowdown"]) == (16, 0.04)
    assert (gloo.figures["sms"], gloo.figures["gemm_slowdown"]) == (None, -0.02)  # unseen on a rank is unseen
    assert (memcpy.figures["sms"], memcpy.figures["gemm_slowdown"]) == (None, 0.3)  # rank 1 copies nothing


@pytest.mark.parametrize("options", [["--transport", "gloo"], ["--bidirectional"]])
def test_other_ways(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, report, _ = run([*TINY, *options], capsys)
    assert code == 0
    provider = "group" if "gloo" in options else "host"
    assert [row["provider"] for row in report["rows"]] == [provider, "gloo", "memcpy"] * 2
    assert all(row["correct"] and row["p50_us"] <= row["p99_us"] for row in report["rows"])


@pytest.mark.parametrize("transport", ["device", "nccl"])
def test_a_gpu_that_is_not_there(transport: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main([*TINY, "--transport", transport]) == 1
    assert f"pipex bench p2p --transport {transport} measures on a GPU and there is none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-b", "4X"], "not a size; got '4X'"),
        (["-b", "8K", "-e", "4K"], "the range of sizes is empty"),
        (["-n", "0"], "nothing would be measured; got -n 0 -w 5"),
        (["--min-ratio", "5K=2"], "a floor for a case that is not measured; got 5K"),
        (["--max-us", "4K=fast"], "not a floor; got '4K=fast'"),
        (["-f", "4", "-i", "4K"], "two ways from one size to the next; got -f 4 and -i 4K"),
        (["-f", "0"], "the range of sizes would not end; got -f 0"),
        (["-i", "4KB"], "not a size; got '4KB'"),
        (["--virtual-devices"], "only ranks that share a GPU get shares of it; got --transport host"),
        (["--virtual-devices", "--transport", "nccl"], "shares of it; got --transport nccl"),
    ],
)
def test_bad_options_are_named_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(p2p, "launch")
    assert main(["bench", "p2p", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "bytes_of_messages"),
    [
        (["-b", "1", "-e", "4K", "-f", "64"], [1, 64, 4096]),
        (["--minbytes", "1K", "--maxbytes", "4k", "--stepbytes", "1024"], [1024, 2048, 3072, 4096]),
        (["-b", "16K", "-e", "1M"], [16384, 65536, 262144, 1048576]),
    ],
)
def test_sizes_as_nccl_tests_has_them(
    arguments: list[str], bytes_of_messages: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    monkeypatch.setattr(p2p, "measure", lambda sizes, *_, **__: measured.extend(sizes) or rows(sizes))
    assert main(["bench", "p2p", *arguments]) == 0
    assert measured == bytes_of_messages


def rows(sizes: Sequence[int], provider: str = "host", **changes: float | None) -> list[Row]:
    """Of pipex's provider, as good as can be."""
    best = {"send_us": 1.0, "copy_share": 1.0, "sms": 0, "gemm_slowdown": 0.0, **changes}
    return [Row(format_size(n), provider, {"bytes": n}, Quantiles(9.0, 9.5, 9.9), 2.0, True, best) for n in sizes]


FLOORS = ["--max-us", "64K=10", "--max-send-us", "64K=5", "--max-sms", "4K=0,64K=0", "--max-gemm-slowdown", "64K=0.03",
          "--min-copy-share", "64K=0.9"]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"send_us": 5.1}, "64K: send_us of host is 5.1, above the ceiling of 5"),
        ({"sms": 1}, "4K: sms of host is 1, above the ceiling of 0"),
        ({"sms": None}, "4K: sms of host could not be measured, and a limit of 0 was asked for"),
        ({"gemm_slowdown": 0.031}, "64K: gemm_slowdown of host is 0.031, above the ceiling of 0.03"),
        ({"gemm_slowdown": None}, "64K: gemm_slowdown of host could not be measured"),
        ({"copy_share": 0.89}, "64K: copy_share of host is 0.89, below the floor of 0.9"),
    ],
)
def test_floors_of_all_figures(
    changes: dict[str, float | None], sentence: str | None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(p2p, "measure", lambda sizes, *_, **__: rows(sizes, **changes))
    assert main(["bench", "p2p", "-b", "4K", "-e", "64K", *FLOORS]) == (sentence is not None)
    assert (sentence or "") in capsys.readouterr().err
    assert main(["bench", "p2p", "-b", "4K", "-e", "64K", "--max-us", "64K=9.4"]) == 1
    assert "64K: p50_us of host is 9.5, above the ceiling of 9.4" in capsys.readouterr().err


def test_virtual_devices_are_there_while_ranks_run_and_cuda_starts_afterwards(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    @contextmanager
    def shared_among(ranks: int) -> Iterator[None]:
        events.append(ranks)
        yield
        events.append("given back")

    def measure(sizes: Sequence[int], *_: Any, **options: Any) -> list[Row]:
        events.append(options)
        return rows(sizes, "device")

    monkeypatch.setattr(p2p, "shared_among", shared_among)
    monkeypatch.setattr(p2p, "check_gpus", lambda name: events.append(name))
    monkeypatch.setattr(p2p, "measure", measure)
    monkeypatch.setattr(gpu, "require_gpu", lambda command: events.append("CUDA"))
    monkeypatch.setattr(gpu, "describe_gpu", lambda device: {"gpu": "abacus"})
    arguments = ["bench", "p2p", "-b", "4K", "-e", "4K", "--transport", "device", "--json"]
    for virtual in ([], ["--virtual-devices"]):
        code, report, _ = run([*arguments, *virtual], capsys)
        assert code == 0
        assert report["environment"]["gpu"] == "abacus"
        assert report["environment"]["virtual_devices"] == bool(virtual)
    options = {"both_ways": False, "virtual_devices": False}
    assert events == [
        "device", options, "CUDA", "device", 2, {**options, "virtual_devices": True}, "given back", "CUDA",
    ]  # fmt: skip


class CountingWatch:
    """Gives the calls that it watched numbers in place of multiprocessors."""

    def __init__(self, device: torch.device) -> None:
        self._calls = 0

    def __enter__(self) -> CountingWatch:
        return self

    def __exit__(self, *_: object) -> None: ...

    def watch(self, call: Callable[[], object]) -> None:
        call()
        self._calls += 1

    def multiprocessors(self) -> list[int]:
        return list(range(self._calls))


def on_device(
    library: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], *, virtual: bool, both_ways: bool = False
) -> list[Any]:
    """What both ranks find on the simulated driver; a message takes 0.1 ms of the GPU's virtual time."""
    fake = FakeGpu(monkeypatch)
    for kind in (RoundTrips, Copies):

        def transfer(self: Any, outgoing: Sequence[Tensor], real: Any = kind.transfer) -> Tensor | None:
            received: Tensor | None = real(self, outgoing)
            fake.work(0.1 * len(outgoing))
            return received

        monkeypatch.setattr(kind, "transfer", transfer)
    monkeypatch.setattr(p2p, "KernelWatch", CountingWatch)
    monkeypatch.setattr(beside, "SAMPLES", 1)
    job = ("device", sizes, 2, 1, both_ways, virtual)
    with device_world.start([lambda _: p2p._rank(*job)] * 2, library) as forked:  # with what is patched here
        return device_world.results([forked.outcome(rank) for rank in range(2)])


@pytest.mark.parametrize(("sizes", "both_ways"), [([1, 3072], False), ([3072], True)])
def test_device_memory_by_the_simulated_driver(
    simulated_cuda: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], both_ways: bool
) -> None:
    """With more messages beside products than slots, each way, until they last long enough."""
    found = on_device(simulated_cuda, monkeypatch, sizes, virtual=True, both_ways=both_ways)
    for rank, by_size in enumerate(found):
        assert [size["sms"] for size in by_size] == [
            {"device": 3 * index, "gloo": 3 * index + 1, "copy": 3 * index + 2} for index in range(len(sizes))
        ]
        for size in by_size:
            assert size["wrong"] == {"device": 0, "gloo": 0, "copy": 0}
            assert [len(size["samples"][name]) for name in ("device", "gloo", "copy")] == [2, 2, 2]
            assert [len(size["sends"][name]) for name in ("device", "gloo", "copy")] == [2, 2, 0]
            assert size["slowdown"] == {
                "device": pytest.approx(0.0), "gloo": pytest.approx(0.0),
                "copy": pytest.approx(0.0) if rank == 0 else None,
            }  # fmt: skip


def test_ranks_that_get_the_gpu_by_turns_have_no_slowdown(
    simulated_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for (size,) in on_device(simulated_cuda, monkeypatch, [3072], virtual=False):
        assert size["slowdown"] == {"device": None, "gloo": None, "copy": None}
        assert size["sms"] == {"device": 0, "gloo": 1, "copy": 2}
