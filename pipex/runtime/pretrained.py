"""Saving and loading the files of a pretrained model, all ranks together.

``names`` are a rank's tensors by what they are called in the unsplit model (``checkpoint.names_of`` its stages).
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipex import state
from pipex.errors import CheckpointError
from pipex.hugging_face import Card, Group, Part, matches
from pipex.partition import Stage
from pipex.runtime.agreement import share
from pipex.runtime.checkpoint import different, names_of, together
from pipex.runtime.copying import checksum
from pipex.state.files import first_few
from pipex.transport.interface import World

LARGEST_FILE = 5 << 30
"""Bytes of a file, except of a larger tensor alone: what is converted is beside the model in host memory, a file at a
time."""


def card_of(stages: Sequence[Stage]) -> Card:
    """
    Raises:
        CheckpointError: the stages are of no model that has such files.
    """
    card = stages[0].card
    if card is None:
        raise CheckpointError(
            "these stages are of no model of transformers or PEFT", got="another model",
            needed="stages that pipex.split_model has made from one", fix="use save and load",
        )  # fmt: skip
    if card.refused:
        raise CheckpointError(
            f"{card.kind} has no files that can be written or read by stage", got=card.refused, fix="use save and load"
        )
    return card


def save(
    world: World, stages: Sequence[Stage], directory: str | os.PathLike[str], owners: Mapping[str, int]
) -> str | None:
    """Every rank writes the tensors of its stages; when all have, rank 0 makes them the files of the model.

    Args:
        stages: those of this rank.
        owners: by name, the rank that saves what several hold alike.

    Returns:
        None if it is saved; otherwise what went wrong, the same on every rank, and nothing of this attempt is left.
    """
    rank, error = world.rank, ""
    parts: tuple[Part, ...] = ()
    pieces: list[list[state.Piece]] = []
    dtypes: dict[str, str] = {}
    sums: dict[str, int] = {}
    try:
        parts, names = card_of(stages).parts, names_of(stages)
        sums = {name: checksum(tensor) for name, tensor in names.items() if name in owners}
        dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in names.items() if t.is_floating_point()}
        mine = {name: tensor.detach() for name, tensor in names.items() if owners.get(name, rank) == rank}
        for part in parts:
            if not part.one_file and (new := sorted(names.keys() - part.meant.values())):
                raise CheckpointError(
                    "the stages hold more than the model when it was split", got=first_few(new),
                    needed="tensors of the model", fix="change the model before it is split",
                )  # fmt: skip
            pieces.append([])
            state.withdraw(Path(directory, part.folder), part.stem, rank)
            for tensors in _files(part, mine):
                pieces[-1].append(state.write_piece(Path(directory, part.folder), part.stem, rank, tensors))
    except CheckpointError as failure:
        error = f"rank {rank}: {failure}"
    said = share(world, "save_pretrained", [pieces, error, dtypes, sums])
    errors = [text for _, text, *_ in said if text] + different([theirs for *_, theirs in said])
    if rank == 0 and not errors:
        types = {name: dtype for _, _, theirs, _ in said for name, dtype in theirs.items()}
        try:
            for number, part in enumerate(parts):
                _publish(part, Path(directory, part.folder), [p for theirs, *_ in said for p in theirs[number]], types)
        except CheckpointError as failure:
            errors = [f"rank 0: {failure}"]
    if rank == 0 and errors:  # before any rank can begin another save
        for part in parts:
            state.withdraw(Path(directory, part.folder), part.stem)
    errors = share(world, "save_pretrained", errors)[0]
    return None if not errors else f"nothing was saved in {directory}; what was there stays: {'; '.join(errors)}"


def _files(part: Part, mine: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file that this rank writes.

    Raises:
        CheckpointError: what is converted together is not all on this rank.
    """
    tensors: dict[str, Tensor] = {}
    size = 0
    for group in part.groups:
        held = {name: mine[part.names[name]] for name in group.sources if part.names[name] in mine}
        if not held:
            continue
        if apart := sorted(group.sources.keys() - held.keys()):
            raise CheckpointError(
                f"{sorted(held)[0]} and {apart[0]} are on different ranks", got="one tensor in the files of the model",
                needed="both in one stage", fix="cut elsewhere (balance=)",
            )  # fmt: skip
        more = sum(tensor.nbytes for tensor in held.values())
        if tensors and size + more > LARGEST_FILE:
            yield tensors
            tensors, size = {}, 0
        # Beside the model there may be no room on the device.
        tensors |= part.for_files(group, held if group.converter is None else {n: t.cpu() for n, t in held.items()})
        size += more
    if tensors:
        yield tensors


def _publish(part: Part, directory: Path, pieces: Sequence[state.Piece], dtypes: Mapping[str, str]) -> None:
    """
    Raises:
        CheckpointError: what the ranks have written is not what transformers would write of the unsplit model.
    """
    written = [(name, tuple(shape)) for piece in pieces for name, shape in piece["shapes"].items()]
    if sorted(written) != sorted(part.shapes.items()):
        found, needed = dict(written), dict(part.shapes)
        twice = [name for name, times in Counter(name for name, _ in written).items() if times > 1]
        raise CheckpointError(
            "the stages do not hold what the model held when it was split",
            got=state.listed(
                missing=sorted(needed.keys() - found.keys()), twice=twice,
                different=[f"{n} is {list(found[n])}, needed {list(needed[n])}" for n in needed
                           if found.get(n, needed[n]) != needed[n]],
            ), fix="change the model before it is split",
        )  # fmt: skip
    dtype = next((getattr(torch, dtypes[name]) for name in part.names.values() if name in dtypes), None)
    state.publish(directory, part.stem, pieces, lambda to: part.settings.write(to, dtype), one_file=part.one_file)


def load(
    world: World, stages: Sequence[Stage], directory: str | os.PathLike[str], main: Mapping[str, Tensor], blank: bool
) -> str | None:
    """Every rank reads the tensors of its stages, when all have found that the files are of this model.

    Args:
        main: this rank's main weights by name, which become what is read.
        blank: whether the model has no values yet.

    Returns:
        None if it is loaded; otherwise what is wrong, the same on every rank, and nothing has changed.

    Raises:
        CheckpointError: a file could not be read any more when the first tensors had been changed.
    """
    found: list[_Found] = []
    identity, error = 0, ""
    names: dict[str, Tensor] = {}
    try:
        card, names = card_of(stages), names_of(stages)
        for part in card.parts:
            files = state.PretrainedFiles(Path(directory, part.folder), part.stem)
            forms = sorted((name, str(form.dtype), tuple(form.shape)) for name, form in files.forms.items())
            identity = zlib.crc32(repr(forms).encode(), identity)
            found.append(_Found(part, files, blank))
            found[-1].check(names)
    except CheckpointError as failure:
        error = str(failure)
    said = share(world, "load_pretrained", [identity, error])
    if problem := together([text for _, text in said]):
        return problem
    if any(theirs != identity for theirs, _ in said):
        return f"the ranks find different files in {directory}; load from a directory that all hosts share"
    with torch.no_grad():
        for one in found:
            one.put(names)
        for name, weight in main.items():
            weight.copy_(names[name])
    return None


class _Found:
    """The files of a part of a model, and what of it is in them."""

    def __init__(self, part: Part, files: state.PretrainedFiles, blank: bool) -> None:
        """
        Raises:
            CheckpointError: they are of another model; lists all names that are missing, not the model's, or of
                another shape. Or transformers cannot convert them.
        """
        self._part, self._files = part, files
        self._groups: dict[str, Group] = {}  # by the name of what it makes, of tied ones each
        self._offers: dict[str, list[str]] = {}  # names of what is made, by what a stage calls it
        unexpected, different, twice = [], [], []
        for group in part.groups_of(files.forms):
            for name, form in part.from_files(group, {source: files.forms[source] for source in group.sources}).items():
                if name not in part.meant:
                    unexpected += [] if matches(name, part.unread) else [name]
                    continue
                needed = part.known.forms[name]
                if form.shape != needed.shape or form.is_floating_point() != needed.is_floating_point():
                    different.append(f"{name} is {state.form(form)}, needed {state.form(needed)}")
                if name in self._groups:
                    twice.append(name)
                self._groups[name] = group
                self._offers.setdefault(part.meant[name], []).append(name)
        lacking = [name for name, meant in part.meant.items() if meant not in self._offers]
        missing = [name for name in lacking if blank or not matches(name, part.unsaved)]
        if missing or unexpected or different or twice:
            raise CheckpointError(
                f"the files in {files.directory} are of another model",
                got=state.listed(missing=missing, unexpected=unexpected, different=different, twice=twice),
                fix="build the model that was saved",
            )

    def check(self, names: Mapping[str, Tensor]) -> None:
        """
        Raises:
            CheckpointError: tensors of this rank are tied, and have different values in the files; or were changed.
        """
        for name, offers in self._offers.items():
            if name not in names:
                continue
            if (now := names[name].shape) != (needed := self._part.known.forms[offers[0]].shape):
                raise CheckpointError(f"{name} was changed", got=list(now), needed=f"{list(needed)}, as it was split")
            values = [self._made(self._groups[offer])[offer] for offer in (offers if len(offers) > 1 else ())]
            if any(not torch.equal(value, values[0]) for value in values):
                raise CheckpointError(
                    f"the files in {self._files.directory} are of another model",
                    got=f"{' and '.join(offers)}, which differ", needed="the same, as they are one tensor here",
                    fix="build a model that does not tie them",
                )  # fmt: skip

    def put(self, names: Mapping[str, Tensor]) -> None:
        """Raises: CheckpointError: a file cannot be read any more."""
        wanted = {offers[0]: names[name] for name, offers in self._offers.items() if name in names}
        while wanted:
            first = next(iter(wanted))
            made = self._made(self._groups[first])
            for name in {first} | (made.keys() & wanted.keys()):
                wanted.pop(name).copy_(made[name])

    def _made(self, group: Group) -> dict[str, Tensor]:
        return self._part.from_files(group, self._files.read(group.sources))
