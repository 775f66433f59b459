"""10,000 mutants of the plans of all families: exactly the wrong ones are refused, and the message names what is wrong.

What is wrong is said by ``Replay``, which runs the orders step by step and shares no code with the validator.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest

from pipex.errors import DeadlockError, PlanError
from pipex.plan.actions import Action, Kind, parse_action
from pipex.plan.families import FAMILIES, build, options_of
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.validator import validate

MUTANTS = 10_000
ALONE = (Kind.W, Kind.UPDATE)
"""take and give no message"""


class Wrong(Exception):
    """The plan cannot be run as it stands."""


class Channel(NamedTuple):
    """A queue of messages between stages on different ranks."""

    name: str
    source: int
    destination: int


class Replay:
    """Runs a plan from first principles; raises Wrong with the reason.

    Every rank runs its actions in order. What comes out of a channel must be what is wanted. An action of several parts
    takes all its messages, runs, then sends.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        place = plan.placement
        down, up = list(range(place.ranks)), list(reversed(range(place.ranks)))
        self.holder = [r for c in range(place.chunks) for r in (up if c % 2 and place.name != "loop" else down)]
        stages = list(range(len(self.holder)))
        half = place.ranks if place.name == "bidirectional" else len(stages)
        self.chains = [chain for chain in (stages[:half], stages[half:]) if chain]
        self.before = {t: s for chain in self.chains for s, t in pairwise(chain)}
        self.after = {s: t for t, s in self.before.items()}
        self.letters = {"F", "I", "W", "B"} | ({"UPDATE"} if plan.update in ("microbatch", "delayed") else set())
        self.touched: dict[int, set[int]] = {stage: set() for stage in stages}
        self.summed: dict[int, set[int]] = {stage: set() for stage in stages}
        """per stage the micro-batches with a backward, and those with their weight gradient, since its last update"""
        self.updates = dict.fromkeys(stages, 0)
        self.stuck: dict[int, set[int]] = {}
        """of a deadlock: the ranks that each stuck rank waits for"""

    def run(self) -> None:
        self._check_inventory()
        self.queues: dict[Channel, deque[int]] = {}
        self.done: set[tuple[str, int, int]] = set()
        at = [0] * len(self.plan.orders)
        while any(self._step(rank, at) for rank in range(len(at))):
            pass
        for rank, order in enumerate(self.plan.orders):
            if at[rank] < len(order):
                self.stuck[rank] = {self.holder[channel.source] for channel in self._missing(order[at[rank]])}
        if self.stuck:
            raise Wrong("deadlock")
        self._check_promise()

    def _check_inventory(self) -> None:
        """Every action once, on its rank; every micro-batch through one chain."""
        found: Counter[tuple[str, int, int]] = Counter()
        for rank, order in enumerate(self.plan.orders):
            for action in order:
                letters = "".join(part.kind.value for part in action.parts)
                if letters and not re.fullmatch("F+[IWB]+", letters):
                    raise Wrong(f"{action} is no forward joined with a backward")
                for part in action.parts or (action,):
                    if part.kind.value not in self.letters or not 0 <= part.stage < len(self.holder):
                        raise Wrong(f"{part} does not exist")
                    if self.holder[part.stage] != rank:
                        raise Wrong(f"{part} is not of rank {rank}")
                    found[part.kind.value, part.stage, part.microbatch] += 1
        self.lasts = {
            stage: sorted(m for kind, s, m in found if (kind, s) == ("UPDATE", stage))
            for stage in range(len(self.holder))
        }
        every = list(range(self.plan.microbatches))
        for stage in self.lasts if "UPDATE" in self.letters else ():
            wanted = every if self.plan.update == "microbatch" else sorted({*self.lasts[0], every[-1]})
            if self.lasts[stage] != wanted or any(found.pop(("UPDATE", stage, m)) != 1 for m in wanted):
                raise Wrong(f"stage {stage} makes the updates {self.lasts[stage]}")
        backwards = [Counter("")] if self.plan.update == "never" else [Counter("B"), Counter("IW")]
        for m in range(self.plan.microbatches):
            chain = next((chain for chain in self.chains if any(found["F", s, m] for s in chain)), self.chains[0])
            for stage in chain:
                has = +Counter({letter: found.pop((letter, stage, m), 0) for letter in "FIWB"})
                if has not in [Counter("F") + backward for backward in backwards]:
                    raise Wrong(f"stage {stage} runs {has} of micro-batch {m}")
        if +found:
            raise Wrong(f"nobody asked for {+found}")

    def _check_promise(self) -> None:
        """No rank holds more than promised: what an action begins is held beside what it ends."""
        for order, promised in zip(self.plan.orders, self.plan.peak_activations, strict=True):
            held: set[tuple[int, int]] = set()
            for action in order:
                parts = action.parts or (action,)
                held |= {(part.stage, part.microbatch) for part in parts if part.kind is Kind.F}
                if len(held) > promised:
                    raise Wrong(f"{action} makes it {len(held)} activations")
                held -= {(part.stage, part.microbatch) for part in parts if part.kind in (Kind.W, Kind.B)}
                if self.plan.update == "never":
                    held.clear()

    def _step(self, rank: int, at: list[int]) -> bool:
        """Runs the next action of the rank if its messages are there."""
        order = self.plan.orders[rank]
        if at[rank] == len(order) or self._missing(order[at[rank]]):
            return False
        parts = order[at[rank]].parts or (order[at[rank]],)
        for part in parts:
            if (channel := self._input(part)) and (got := self.queues[channel].popleft()) != part.microbatch:
                raise Wrong(f"{part} gets the message of micro-batch {got}")
            for letters, stage in self._needs_on_rank(part):
                if not any((letter, stage, part.microbatch) in self.done for letter in letters):
                    raise Wrong(f"{part} runs without {letters} of stage {stage}")
        for part in parts:
            self._change_weights(part)
            self.done.add((part.kind.value, part.stage, part.microbatch))
            if channel := self._output(part):
                self.queues.setdefault(channel, deque()).append(part.microbatch)
        at[rank] += 1
        return True

    def _change_weights(self, part: Action) -> None:
        """What an update finds must be the gradients of its own micro-batches: all of them and no others."""
        stage, made = part.stage, self.updates[part.stage]
        match part.kind.value:
            case "UPDATE":
                begin = self.lasts[stage][made - 1] + 1 if made else 0
                own = set(range(begin, part.microbatch + 1))
                if part.microbatch != self.lasts[stage][made]:
                    raise Wrong(f"{part} is not the next one")
                if self.summed[stage] != own or self.touched[stage] != own:
                    raise Wrong(f"{part} finds gradients of {self.summed[stage]} and more of {self.touched[stage]}")
                self.summed[stage], self.touched[stage], self.updates[stage] = set(), set(), made + 1
            case "F":
                group = sum(last < part.microbatch for last in self.lasts[stage])
                if self.plan.update == "delayed" and group - 1 > made:
                    raise Wrong(f"{part} would use version {group - 1} of {made}")
            case kind:
                self.touched[stage].add(part.microbatch)
                self.summed[stage] |= {part.microbatch} if kind in "WB" else set()

    def _missing(self, action: Action) -> list[Channel]:
        """The channels that hold fewer messages than the action takes."""
        wanted = Counter(channel for part in action.parts or (action,) if (channel := self._input(part)))
        return [channel for channel, number in wanted.items() if len(self.queues.get(channel, ())) < number]

    def _input(self, part: Action) -> Channel | None:
        name, sources = ("activation", self.before) if part.kind is Kind.F else ("gradient", self.after)
        return (
            self._channel(name, sources.get(part.stage), part.stage) if part.kind not in (Kind.W, Kind.UPDATE) else None
        )

    def _output(self, part: Action) -> Channel | None:
        name, targets = ("activation", self.after) if part.kind is Kind.F else ("gradient", self.before)
        return (
            self._channel(name, part.stage, targets.get(part.stage)) if part.kind not in (Kind.W, Kind.UPDATE) else None
        )

    def _channel(self, name: str, source: int | None, destination: int | None) -> Channel | None:
        if source is None or destination is None or self.holder[source] == self.holder[destination]:
            return None
        return Channel(name, source, destination)

    def _needs_on_rank(self, part: Action) -> Iterator[tuple[str, int]]:
        """What must be done already: a stage, and the letters of which one will do."""
        stage = part.stage
        if part.kind is Kind.UPDATE:
            return
        if part.kind is Kind.W:
            yield "I", stage
        elif part.kind is not Kind.F:
            yield "F", stage
            if stage in self.after and not self._input(part):
                yield "IB", self.after[stage]
        elif stage in self.before and not self._input(part):
            yield "F", self.before[stage]


Orders = list[list[Action]]


class Atom(NamedTuple):
    """One of F, I, W, B and UPDATE where it stands: a whole action, or a part of one."""

    rank: int
    position: int
    part: int
    action: Action


def atoms_of(orders: Orders) -> list[Atom]:
    return [
        Atom(rank, position, index, part)
        for rank, order in enumerate(orders)
        for position, action in enumerate(order)
        for index, part in enumerate(action.parts or (action,))
    ]


def put(orders: Orders, atom: Atom, *new: Action) -> None:
    """Replaces the atom. A joined action keeps one part at least two; a single one left stands alone."""
    old = orders[atom.rank][atom.position]
    parts = [*(old.parts or (old,))]
    parts[atom.part : atom.part + 1] = new
    joined = [old._replace(parts=tuple(parts))] if old.parts and len(parts) > 1 else parts
    orders[atom.rank][atom.position : atom.position + 1] = joined


def swap(orders: Orders, atom: Atom, rng: random.Random) -> None:
    atoms = [other for other in atoms_of(orders) if other.rank == atom.rank]
    here = atoms.index(atom)
    other = atoms[min(here + 1, len(atoms) - 1)] if rng.random() < 0.6 else rng.choice(atoms)
    put(orders, atom, other.action)
    put(orders, other, atom.action)


def drop(orders: Orders, atom: Atom, rng: random.Random) -> None:
    put(orders, atom)


def duplicate(orders: Orders, atom: Atom, rng: random.Random) -> None:
    """Once more, or something like it that the plan may not ask for."""
    order = orders[atom.rank]
    order.insert(rng.randint(0, len(order)), altered(atom, orders, rng) if rng.random() < 0.5 else atom.action)


def move(orders: Orders, atom: Atom, rng: random.Random) -> None:
    put(orders, atom)
    order = orders[atom.rank]
    place = atom.position + rng.randint(-3, 3) if rng.random() < 0.7 else rng.randint(0, len(order))
    order.insert(min(max(place, 0), len(order)), atom.action)


def wrong_rank(orders: Orders, atom: Atom, rng: random.Random) -> None:
    put(orders, atom)
    order = rng.choice(orders)
    order.insert(rng.randint(0, len(order)), atom.action)


def wrong_name(orders: Orders, atom: Atom, rng: random.Random) -> None:
    put(orders, atom, altered(atom, orders, rng))


def altered(atom: Atom, orders: Orders, rng: random.Random) -> Action:
    """Of another stage, micro-batch or kind, which need not exist."""
    stage, _, microbatch, _ = action = atom.action
    match rng.choice(["stage", "microbatch", "kind"]):
        case "stage":
            on_rank = {other.action.stage for other in atoms_of(orders) if other.rank == atom.rank}
            return action._replace(stage=rng.choice([-1, stage - 1, stage + 1, 2 * len(orders), *sorted(on_rank)]))
        case "microbatch":
            return action._replace(microbatch=microbatch + rng.choice([-2, -1, 1, 2]))
    return action._replace(kind=rng.choice([Kind.F, Kind.I, Kind.W, Kind.B, rng.choice([*Kind])]))


def mixed_backward(orders: Orders, atom: Atom, rng: random.Random) -> None:
    """B beside I and W of the same micro-batch, B for one of them, or (right, if W's place allows) the other way."""
    i, w, b = (atom.action._replace(kind=kind) for kind in (Kind.I, Kind.W, Kind.B))
    put(orders, atom, *rng.choice([(i, w), (w, i), (b,), (b, w), (i, b), (i,), (w,)]))
    if rng.random() < 0.5:
        twin = [other for other in atoms_of(orders) if other.action in (w, i) and other.rank == atom.rank]
        if twin:
            put(orders, rng.choice(twin))


def join(orders: Orders, atom: Atom, rng: random.Random) -> None:
    """One action of two neighbours, or the parts of one alone."""
    order, here = orders[atom.rank], atom.position
    if order[here].parts:
        order[here : here + 1] = order[here].parts
    else:
        parts = tuple(part for action in order[here : here + 2] for part in action.parts or (action,))
        order[here : here + 2] = [Action(-1, Kind.OVERLAP_F_B, -1, parts)]


def riffle(orders: Orders, atom: Atom, rng: random.Random) -> None:
    """Swaps at will between forwards and backwards, each of which keep their order."""
    order = orders[atom.rank]
    piles = [deque(a for a in order if (a.kind is Kind.F) == forward) for forward in (True, False)]
    for at in range(len(order)):
        first, second = piles if rng.random() < 0.6 else reversed(piles)
        order[at] = (first or second).popleft()


MUTATIONS: list[Callable[[Orders, Atom, random.Random], None]] = [
    swap, drop, duplicate, move, wrong_rank, wrong_name, mixed_backward, join, riffle,
]  # fmt: skip


def mutant(plan: Plan, rng: random.Random) -> tuple[str, Plan]:
    """A plan with one to three changes. Half of them may hold more than the plan did, the others are held to it."""
    orders = [list(order) for order in plan.orders]
    mutations = rng.choices(MUTATIONS, k=rng.choice([1, 1, 1, 1, 2, 3]))
    for mutation in mutations:
        if atoms := atoms_of(orders):
            mutation(orders, rng.choice(atoms), rng)
    more = rng.choice([0, 99])
    peaks = tuple(peak + more for peak in plan.peak_activations)
    name = ", ".join(mutation.__name__ for mutation in mutations)
    return name, dataclasses.replace(plan, orders=tuple(map(tuple, orders)), peak_activations=peaks)


def plans_of(family: str) -> list[Plan]:
    """Small plans: what is legal of these sizes and chunks."""
    plans = []
    for ranks, microbatches in [(1, 2), (2, 2), (2, 3), (2, 4), (3, 3), (3, 6), (4, 4), (4, 8)]:
        for chunks in (1, 2, 3, 4) if "chunks" in options_of(family) else (None,):
            try:
                plan = build(family, ranks, microbatches, **({"chunks": chunks} if chunks else {}))
            except PlanError:
                continue
            if sum(map(len, plan.orders)) <= 100:
                plans.append(plan)
    return plans


def verdict(plan: Plan) -> tuple[str, dict[int, set[int]]]:
    """What the replay finds wrong ("" if nothing), and the stuck ranks of a deadlock."""
    replay = Replay(plan)
    try:
        replay.run()
    except Wrong as error:
        return str(error), replay.stuck
    return "", {}


def refusal(plan: Plan) -> PlanError | None:
    try:
        validate(plan)
    except PlanError as error:
        return error
    return None


def check_cycle(message: str, stuck: dict[int, set[int]]) -> None:
    """The cycle closes, and each rank in it waits for the next."""
    waits = re.findall(r"rank (\d+) at position \d+ \(\d+RECV_[FB]\d+\) waits for rank (\d+)", message)
    ranks = [int(rank) for rank, _ in waits]
    assert ranks, message
    assert [int(other) for _, other in waits] == [*ranks[1:], ranks[0]], message
    assert all(other in stuck[rank] for rank, other in zip(ranks, [*ranks[1:], ranks[0]], strict=True)), message


def check_names(message: str, plan: Plan) -> None:
    """The action that the message names is where it says, or misses if it says so."""
    texts = {
        (rank, position): {str(action), *map(str, action.parts)}
        for rank, order in enumerate(plan.orders)
        for position, action in enumerate(order)
    }
    if found := re.match(r"rank (\d+) at position (\d+) \((\S+)\) ", message) or re.match(
        r"rank (\d+) holds more activations than promised; got \d+ at position (\d+) \((\S+)\);", message
    ):
        rank, position, text = int(found[1]), int(found[2]), found[3]
        assert text in texts[rank, position], message
        if other := re.search(r"(?:what it needs,|comes after) (\S+) at position (\d+)", message):
            assert other[1] in texts[rank, int(other[2])], message
        if other := re.search(r"on the (\w+) edge \d+→(\d+); got the message of micro-batch (\d+)", message):
            kinds = {"activation": "F", "gradient": "[IB]"}[other[1]]
            takes = re.findall(rf"\b{other[2]}{kinds}(\d+)", text)
            assert {*takes} - {other[3]}, message
        if other := re.search(r"was done before, at position (\d+)", message):
            assert text in texts[rank, int(other[1])], message
    elif found := re.match(r"rank \d+ never runs (\d+(?:F|UPDATE)\d+); ", message):
        assert not any(found[1] in here for here in texts.values()), message
    else:
        found = re.match(r"rank \d+ lacks a backward of stage (\d+), micro-batch (\d+); ", message)
        assert found, message
        has = {letter for letter in "IWB" for here in texts.values() if f"{found[1]}{letter}{found[2]}" in here}
        assert not has >= {"I", "W"}, message
        assert "B" not in has, message


@pytest.mark.parametrize("family", [*FAMILIES, "random"])
def test_a_mutant_is_refused_exactly_when_it_is_wrong(family: str, random_plans: list[Plan]) -> None:
    rng = random.Random(family)
    plans = random_plans if family == "random" else plans_of(family)
    counts: Counter[str] = Counter()
    for _ in range(-(-MUTANTS // len(FAMILIES))):
        mutations, plan = mutant(rng.choice(plans), rng)
        (wrong, stuck), error = verdict(plan), refusal(plan)
        assert bool(error) == bool(wrong), f"{mutations} of {family}: {wrong or 'right'}, but {error}\n{plan.to_text()}"
        if isinstance(error, DeadlockError):
            check_cycle(str(error), stuck)
        elif error:
            check_names(str(error), plan)
        counts["deadlock" if isinstance(error, DeadlockError) else "wrong" if wrong else "right"] += 1
    assert counts["wrong"] > counts["right"] > 0


@pytest.mark.parametrize(
    ("down", "up", "problem"),
    [
        ("0F0 3F1 3B1 0B0", "2F1 1F0 1B0 2B1", None),
        ("0F0 0F2 3F1 (3F3;3B1)OVERLAP_F_B 3B3 0B0 0B2", "2F1 2F3 1F0 (1F2;1B0)OVERLAP_F_B 1B2 2B1 2B3", None),
        ("0F0 3F1 3B1 0B0 3W0", "2F1 1F0 1B0 2B1", r"4 \(3W0\) is of a micro-batch that passes the other pipe"),
        ("0F0 3F1 3B1 0B0", "2F1 1F0 1B0 2B1 2F0", r"4 \(2F0\) is of a micro-batch that passes the other pipe"),
        ("0F0 3F1 (3B1;0F2)OVERLAP_F_B 0B0 0B2", "2F1 1F0 1B0 2B1 1F2 1B2", r"2 \(\(3B1;0F2\)\S+\) does not join"),
        ("0F0 (3F1;0F2)OVERLAP_F_B 3B1 0B0 0B2", "2F1 1F0 1B0 2B1 1F2 1B2", r"1 \(\(3F1;0F2\)\S+\) does not join"),
        ("0F0 (3F1;3B1)OVERLAP_F_B 0B0", "2F1 1F0 1B0 2B1", r"\(3B1\) runs together with what it needs, 3F1"),
        ("0F0 3F1 0F2 3B1 0B0 0B2", "2F1 1F0 1B0 2B1 1F2 1B2", r"promised; got 3 at position 2 \(0F2\); needed 2"),
    ],
)
def test_mistakes_that_chance_seldom_makes_are_refused_too(down: str, up: str, problem: str | None) -> None:
    """Two ranks with two pipes: stages 0 and 1 down, 2 and 3 up."""
    orders = tuple(tuple(map(parse_action, order.split())) for order in (down, up))
    microbatches = len({part.microbatch for order in orders for action in order for part in action.each})
    peak = 2 if "F3" not in down else 4
    plan = Plan("by-hand", Placement("bidirectional", 2, 2), microbatches, orders, (peak, peak))
    error = refusal(plan)
    assert bool(verdict(plan)[0]) == bool(error) == bool(problem)
    assert re.search(problem or "None", str(error))
