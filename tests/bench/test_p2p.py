from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import device_world
import pytest
import torch
from torch import Tensor

from pipex.bench import p2p
from pipex.bench.driver import Rounds
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
    monkeypatch.setattr(launch, "_fork_is_safe", lambda ranks: True)  # ranks started afresh would not see the damage
    code, report, errors = run(TINY, capsys)
    assert code == 1
    assert [row["correct"] for row in report["rows"]] == [False, True, True] * 2
    assert "pipex bench: 1: host gave a wrong result" in errors


def test_the_message_before_is_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    receive: Any = p2p.TorchReceiver.receive
    before = torch.zeros(8, dtype=torch.uint8)

    def receive_late(self: p2p.TorchReceiver, step: int, microbatch: int, form: object) -> tuple[Tensor, ...]:
        late = before.clone()
        before.copy_(receive(self, step, microbatch, form)[0])
        return (late,)

    monkeypatch.setattr(p2p.TorchReceiver, "receive", receive_late)
    monkeypatch.setattr(launch, "_fork_is_safe", lambda ranks: True)
    assert [row.correct for row in p2p.measure([8], Rounds(1, 0))] == [True, False, True]


def test_neighbouring_contents_differ_in_every_byte() -> None:
    noise = torch.randint(256, (64,), dtype=torch.uint8)
    messages = [torch.empty_like(noise) for _ in range(256)]
    for number, message in enumerate(messages, 1000):
        p2p.fill(message, noise, number)
    assert all(bool((messages[0] != other).all()) for other in messages[1:])


def test_figures_follow_from_the_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = {"host": [1.0, 4.0, 2.0], "gloo": [40.0, 9.0, 90.0], "memcpy": [1.0, 1.0, 1.0]}
    correct = dict.fromkeys(samples, True)
    sends = {"host": [3e-6, 1e-6, 2e-6], "gloo": [1e-6], "memcpy": []}
    ranks = [
        [{"samples": samples, "correct": correct, "sends": sends}],
        [{"samples": {}, "correct": {**correct, "gloo": False}, "sends": {}}],  # its clock does not count, its eyes do
    ]
    monkeypatch.setattr(p2p, "launch", lambda *args, **kwargs: ranks)
    host, gloo, memcpy = p2p.measure([4000], Rounds(3, 0))
    assert (host.time.p50, host.ratio, host.correct) == (2.0, 20.0, True)
    assert host.figures == {"gb_per_s": 2.0, "copy_share": 0.5, "p99_us": pytest.approx(3.96), "send_us": 2.0}
    assert (gloo.time.p50, gloo.ratio, gloo.correct) == (40.0, 1.0, False)
    assert (memcpy.ratio, memcpy.figures["copy_share"], memcpy.figures["send_us"]) == (40.0, 1.0, None)
    both = p2p.measure([4000], Rounds(3, 0), both_ways=True)[0]
    assert (both.figures["gb_per_s"], both.figures["copy_share"]) == (4.0, 1.0)


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
    ],
)
def test_bad_options_are_named_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(p2p, "launch")
    assert main(["bench", "p2p", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_device_memory_by_the_simulated_driver(simulated_cuda: Path) -> None:
    job = ("device", [1, 3072], 2, 1, False)
    for rank in device_world.launch(p2p._rank, 2, args=job, library=simulated_cuda):
        for size in rank:
            assert size["correct"] == {"device": True, "gloo": True, "copy": True}
            assert len(size["samples"]["device"]) == 2
