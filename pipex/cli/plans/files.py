"""Plans and pictures in files."""

from __future__ import annotations

from pathlib import Path

from pipex.errors import InputError
from pipex.plan import Plan, interop, validate


def read_plan(path: str) -> Plan:
    """A proven plan, from pipex's text form or torch's CSV.

    Raises:
        InputError: the file cannot be read; PlanError: it holds no legal plan.
    """
    plan = interop.read_plan(path)
    validate(plan)
    return plan


def write_plan(path: str, plan: Plan) -> None:
    """Writes torch's CSV, with its sidecar, where ``path`` ends in ``.csv``, else pipex's text form.

    Raises:
        InputError: it cannot be written; PlanError: torch's runtime cannot run it.
    """
    if path.endswith(".csv"):
        interop.write_torch_csv(plan, path)
    else:
        write_text(path, plan.to_text())


def write_text(path: str, text: str) -> None:
    """Raises InputError if it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}", got=error.strerror, fix="choose another place") from None
