"""For which versions of torch a ``compute_comms`` CSV is.

torch 2.15 waits for its sends and reductions by actions of their own (WAIT_SEND_F, WAIT_SEND_B, WAIT_REDUCE_GRAD) and
refuses a file without them; the versions before do not know them. A file of compute actions is for all.
"""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Literal

from pipex.errors import InputError
from pipex.plan.actions import Kind

Versions = Literal[">=2.15", "<2.15"]
"""Of torch, as pip writes them."""

WAIT_FOR = {
    Kind.SEND_F: Kind.WAIT_SEND_F,
    Kind.SEND_B: Kind.WAIT_SEND_B,
    Kind.REDUCE_GRAD: Kind.WAIT_REDUCE_GRAD,
}
WAITED_BY = {wait: start for start, wait in WAIT_FOR.items()}


def versions_like(torch: str | None) -> Versions:
    """Those that read what this version reads, ``"2.14.1"`` for example. None: the installed one, or where torch is not
    installed the newest known.

    Raises:
        InputError: ``torch`` is no version.
    """
    version = _installed() if torch is None else torch
    if version is None:
        return ">=2.15"
    # No number: 2.20 would be read as 2.2.
    match = re.match(r"(\d+)\.(\d+)(?!\d)", version) if isinstance(version, str) else None
    if match is None:
        raise InputError("not a version of torch", got=repr(version), needed="one such as '2.15' or '2.14.1'")
    return ">=2.15" if tuple(map(int, match.groups())) >= (2, 15) else "<2.15"


def versions_of(kinds: Set[Kind]) -> Versions | None:
    """Those that a file with these kinds of actions is for. None: nothing in it tells, so all."""
    if kinds & WAITED_BY.keys():
        return ">=2.15"
    return "<2.15" if kinds & WAIT_FOR.keys() else None


def _installed() -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and most plans are not written

    try:
        return version("torch")
    except PackageNotFoundError:
        return None
