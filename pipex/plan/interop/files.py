"""Plans in files: pipex's text form, or torch's CSV with its sidecar."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from pipex.errors import InputError, PlanSyntaxError
from pipex.plan.interop.sidecar import sidecar_text
from pipex.plan.interop.torch_csv import Format, from_torch_csv, to_torch_csv
from pipex.plan.interop.torch_versions import versions_like
from pipex.plan.plan import BYTE_ORDER_MARK, MAX_TEXT, Plan
from pipex.reading import open_file


def read_plan(path: str | PathLike[str]) -> Plan:
    """The plan in a file: a text form if it begins with ``#``, else a CSV of torch, with ``<path>.json`` as its sidecar
    where there is one. Not yet a proven plan: call ``validate``.

    Raises:
        InputError: the file cannot be opened.
        PlanSyntaxError: it cannot be read as a plan.
        PlanError: its lines do not fit together, or it and its sidecar are of different plans.
    """
    path = Path(path)
    content = _content(path)
    if content.removeprefix(BYTE_ORDER_MARK.encode("latin-1")).startswith(b"#"):
        return Plan.from_text(content)
    sidecar = _sidecar_of(path)
    return from_torch_csv(content, _content(sidecar) if sidecar.exists() else None)


def write_torch_csv(
    plan: Plan, path: str | PathLike[str], format: Format = "compute_only", torch: str | None = None
) -> None:
    """Writes the plan as torch's CSV, and its sidecar beside it; arguments as in ``to_torch_csv``.

    Raises:
        PlanError: the plan is not valid, or not for torch's runtime.
        InputError: a file cannot be written, or ``torch`` is no version.
    """
    path = Path(path)
    text = to_torch_csv(plan, format, torch)
    versions = versions_like(torch) if format == "compute_comms" else None
    for file, content in ((path, text), (_sidecar_of(path), sidecar_text(plan, versions))):
        try:
            file.write_bytes(content.encode())
        except OSError as error:
            raise InputError(f"cannot write {file}", got=error.strerror) from None


def _sidecar_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _content(path: Path) -> bytes:
    """The file's bytes; of one that is too long for a plan no more than it takes to see that."""
    try:
        with open_file(path) as file:
            content = file.read(MAX_TEXT + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}", got=error.strerror) from None
    if not content:
        raise PlanSyntaxError(f"{path} is empty", needed="a plan")
    return content
