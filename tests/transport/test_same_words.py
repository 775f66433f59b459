"""The same failure is the same error, in the same words, on every transport.

Two ranks with an edge from 0 to 1; what is expected is written down here, not taken from one of the transports. Of a
rank that is lost or stalled all say the same, and then what each transport knows of it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from orders import forwards
from transports import TRANSPORTS, start

from pipex.transport.interface import EdgeSpec

DIGEST = bytes(range(16))
SPEC = EdgeSpec(0, 1, "activation", 0, 1, 2, 2)
TENSORS = (torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64))
AT_1F5 = " (step 2, stage 1, action 1F5, micro-batch 5)"
AT_0F5 = " (step 2, stage 0, action 0F5, micro-batch 5)"
MISMATCH = "stage 1 (rank 1) received from stage 0 (rank 0) another message than comes next; got "
ONE_PLAN = "; all ranks must run one plan, step by step"
TOO_LONG = "a payload between ranks is too long; got 67108865 bytes; needed at most 67108864"


def opened(world: Any) -> Any:
    """This rank's end of the edge; the rank is then in micro-batch 5 of step 2."""
    links = world.open([SPEC], DIGEST, forwards(2))
    world.at(2, links.first_position + 5)
    (end,) = (links.receivers if world.rank else links.senders).values()
    return end


def receive(world: Any) -> None:
    opened(world).receive(2, 5)


def send(tensors: tuple[torch.Tensor, ...] = TENSORS, step: int = 2, microbatch: int = 5) -> Callable[[Any], None]:
    def body(world: Any) -> None:
        end = opened(world)
        end.send(step, microbatch, tensors)
        world.exchange(b"")  # the receiver fails, not this
        del end

    return body


def wait(world: Any) -> None:
    opened(world)
    world.exchange(b"")


def meet(deed: Callable[[], object]) -> Callable[[Any], None]:
    """The rank comes to micro-batch 5, and then to this."""

    def body(world: Any) -> None:
        opened(world)
        deed()

    return body


def fail(error: BaseException) -> Callable[[Any], None]:
    def deed() -> None:
        raise error

    return meet(deed)


def kill(number: int) -> Callable[[Any], None]:
    return meet(lambda: os.kill(os.getpid(), number))


def open_with(spec: EdgeSpec, digest: bytes) -> Callable[[Any], None]:
    return lambda world: world.open([spec], digest) and world.exchange(b"")


def header(microbatch: int = 5, step: int = 2) -> str:
    return f"micro-batch {microbatch} of step {step}, activation 0→1, message 0, plan 00010203 (2 tensors, 96 bytes)"


def mismatch(got: str) -> str:
    return f"{MISMATCH}{got}; needed {header()}{ONE_PLAN}"


@dataclass(frozen=True)
class Failure:
    """What two ranks do, and what each must raise: (type, text), a text that ends in … to begin so. A rank without an
    entry does not raise, or is not asked."""

    rank_0: Callable[[Any], None] | None
    rank_1: Callable[[Any], None] | None
    raised: dict[int, tuple[str, str]]
    timeout: float = 30.0
    transports: tuple[str, ...] = field(default=TRANSPORTS)


def at_receiver(rank_0: Callable[[Any], None], text: str) -> Failure:
    """Rank 1 refuses what it gets."""
    told = f"rank 1 failed: MessageMismatch: {text}"
    return Failure(rank_0, receive, {1: ("MessageMismatch", text), 0: ("PeerFailed", told[:500] + "…")})


def at_sender(tensors: tuple[torch.Tensor, ...], kind: str, text: str) -> Failure:
    """Rank 0 refuses to send."""
    return Failure(send(tensors), receive, {0: (kind, text), 1: ("PeerFailed", f"rank 0 failed: {kind}: {text}…")})


OTHER_EDGE = replace(SPEC, slots=3)
DESCRIBED = "activation edge 0→1 (rank 0→1)"
LONG = "x" * 1000

FAILURES = {
    "raises": Failure(
        fail(ZeroDivisionError("a loss of 0\nsecond line")), receive,
        {0: ("ZeroDivisionError", "a loss of 0\nsecond line"),
         1: ("PeerFailed", f"rank 0 failed: ZeroDivisionError: a loss of 0{AT_0F5}")},
    ),
    "raises at length": Failure(
        wait, fail(KeyError(LONG)), {0: ("PeerFailed", f"rank 1 failed: {f'KeyError: {LONG!r}'[:500]}{AT_1F5}")}
    ),
    "asks to end": Failure(wait, fail(SystemExit(3)), {0: ("PeerFailed", f"rank 1 failed: SystemExit: 3{AT_1F5}")}),
    "too many dimensions": at_sender(
        (torch.zeros([1] * 9), TENSORS[1]), "InputError",
        "a tensor between stages has too many dimensions; got 9 (float32[1, 1, 1, 1, 1, 1, 1, 1, 1]); needed at most "
        "8; reshape it in the stage",
    ),
    "a dtype that cannot travel": at_sender(
        (torch.zeros(2, 3, dtype=torch.float8_e4m3fnuz), TENSORS[1]), "InputError",
        "tensors of dtype torch.float8_e4m3fnuz cannot go between stages; needed one of (…",
    ),
    "a sparse tensor": at_sender(
        (torch.eye(3).to_sparse(), TENSORS[1]), "InputError",
        f"a tensor for the {DESCRIBED} is not dense; got layout torch.sparse_coo; needed torch.strided; use "
        "sparse=False in an embedding whose weight is in stages of several ranks, or to_dense()",
    ),
    "a tensor elsewhere": at_sender(
        (TENSORS[0], torch.zeros(4, device="meta")), "InputError",
        f"the {DESCRIBED} is in memory of cpu; got a tensor on meta; needed one on cpu",
    ),
    "another step": at_receiver(send(step=7), mismatch(header(step=7))),
    "another micro-batch": at_receiver(send(microbatch=6), mismatch(header(microbatch=6))),
    "too much to exchange": Failure(
        wait, lambda world: world.exchange(bytes((64 << 20) + 1)),
        {1: ("InputError", TOO_LONG), 0: ("PeerFailed", f"rank 1 failed: InputError: {TOO_LONG} (action setup)")},
    ),
    "other edges": Failure(
        open_with(SPEC, DIGEST), open_with(OTHER_EDGE, DIGEST),
        {0: ("ConfigMismatch", "rank 0 and rank 1 were started with different plans; got on rank 1: "
                               f"{DESCRIBED}: 3 slots, 2 alive; needed as on rank 0: {DESCRIBED}: 2 slots, 2 alive; "
                               "give all ranks the same plan and model")},
    ),
    "another plan": Failure(
        open_with(SPEC, DIGEST), open_with(SPEC, b"\xff" * 16),
        {0: ("ConfigMismatch", f"rank 0 and rank 1 were started with different plans; got on rank 1: plan "
                               f"{'ff' * 16}; needed as on rank 0: plan {DIGEST.hex()}; give all ranks the same plan "
                               "and model")},
    ),
    "is killed": Failure(wait, kill(signal.SIGKILL), {0: ("PeerLost", "rank 1 is gone: …")}),
    "is stopped": Failure(wait, kill(signal.SIGSTOP), {0: ("PeerStalled", "rank 1 is stopped: no …")}, timeout=1.5),
    "computes for ever": Failure(
        wait, meet(lambda: time.sleep(60)),
        {0: ("PeerStalled", "rank 1 is alive but made no progress for 0.5 s…")}, timeout=0.5,
    ),
    "never joins": Failure(wait, None, {0: ("PeerStalled", "rank 1 has not joined within 0.5 s…")}, timeout=0.5),
}  # fmt: skip


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_has_the_same_words(name: str, transport: str, tmp_path: Path, simulated_cuda: Path) -> None:
    failure = FAILURES[name]
    with start(transport, [failure.rank_0, failure.rank_1], tmp_path, simulated_cuda, failure.timeout) as ranks:
        outcomes = {rank: ranks.outcome(rank) for rank in failure.raised}
    for rank, (kind, text) in failure.raised.items():
        outcome = outcomes[rank]
        assert outcome.get("error") == kind, outcome
        begin = text.partition("…")[0]
        assert outcome["text"] == text or (begin != text and outcome["text"].startswith(begin)), outcome


def wait_for_each_other(world: Any) -> None:
    specs = [SPEC, EdgeSpec(1, 0, "gradient", 1, 0, 1, 1)]
    links = world.open(specs, DIGEST, forwards(2))
    world.at(2, links.first_position + 5)
    (receiver,) = links.receivers.values()
    receiver.receive(2, 5)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_circle_of_waits_is_named_by_all(transport: str, tmp_path: Path, simulated_cuda: Path) -> None:
    with start(transport, [wait_for_each_other] * 2, tmp_path, simulated_cuda, timeout=0.5) as ranks:
        outcomes = [ranks.outcome(rank) for rank in range(2)]
    for outcome in outcomes:
        assert outcome.get("error") == "PeerStalled", outcome
        assert outcome["text"].startswith("rank 0 is in a circle of waiting ranks (0 → 1 → 0) for 0.5 s"), outcome
        assert outcome["text"].endswith(AT_0F5), outcome
