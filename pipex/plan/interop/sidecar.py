"""What torch's CSV cannot say about a plan, in a JSON file beside it: ``FILE.csv.json`` for ``FILE.csv``.

    {"pipex plan": 1, "family": "zb-h1", "placement": "loop", "ranks": 2, "chunks": 1, "microbatches": 4,
     "update": "step", "peak_activations": [2, 2], "digest": "(32 hexadecimal digits)"}

The digest is that of the whole plan, so that a sidecar fits one CSV only. Beside a CSV in format ``compute_comms`` one
more key says for which versions of torch that is: ``"torch": ">=2.15"`` or ``"torch": "<2.15"``.
"""

from __future__ import annotations

import json
from typing import Any, cast, get_args

from pipex.errors import PlanError, PlanSyntaxError
from pipex.plan.interop.torch_versions import Versions
from pipex.plan.placement import Placement, PlacementName
from pipex.plan.plan import Orders, Plan
from pipex.plan.versions import Update

_MAX_LENGTH = 1 << 20  # a plan of 100,000 ranks has a shorter one

_TYPES = {
    "pipex plan": int,
    "family": str,
    "placement": str,
    "ranks": int,
    "chunks": int,
    "microbatches": int,
    "update": str,
    "peak_activations": list,
    "digest": str,
}


def sidecar_text(plan: Plan, versions: Versions | None = None) -> str:
    """The JSON object, on one line. ``versions``: those of torch that the CSV beside it is for; None: all."""
    fields: dict[str, object] = {
        "pipex plan": 1,
        "family": plan.family,
        "placement": plan.placement.name,
        "ranks": plan.placement.ranks,
        "chunks": plan.placement.chunks,
        "microbatches": plan.microbatches,
        "update": plan.update,
        "peak_activations": plan.peak_activations,
        "digest": plan.digest.hex(),
    }
    assert fields.keys() == _TYPES.keys()
    if versions:
        fields["torch"] = versions
    return json.dumps(fields) + "\n"


def plan_with_metadata(orders: Orders, versions: Versions | None, text: str | bytes) -> Plan:
    """The plan of these orders and a sidecar. ``versions``: those of torch for which the CSV is by its actions; None:
    they do not tell.

    Raises:
        PlanSyntaxError: the sidecar cannot be read.
        PlanError: it is of another plan, or for other versions of torch.
    """
    fields = _fields(text)
    said = fields.get("torch")
    if said and versions and said != versions:
        raise PlanError(
            "the CSV and its sidecar are for different versions of torch",
            got=f"torch{versions} by the CSV's actions",
            needed=f"torch{said}, as the sidecar says",
            fix="write the CSV again for the torch that is to load it",
        )
    plan = Plan(
        family=fields["family"],
        placement=Placement(cast(PlacementName, fields["placement"]), fields["ranks"], fields["chunks"]),
        microbatches=fields["microbatches"],
        orders=orders,
        peak_activations=tuple(fields["peak_activations"]),
        update=cast(Update, fields["update"]),
    )
    if plan.digest.hex() != fields["digest"]:
        raise PlanError(
            "the CSV and its sidecar are of different plans",
            got=f"digest {plan.digest.hex()}",
            needed=f"{fields['digest']}, as the sidecar says",
            fix="delete the sidecar if the CSV was changed on purpose",
        )
    return plan


def _fields(text: str | bytes) -> dict[str, Any]:
    if len(text) > _MAX_LENGTH:
        raise PlanSyntaxError("cannot read the sidecar", got=f"{len(text)} characters", needed=f"{_MAX_LENGTH} at most")
    try:
        fields = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise PlanSyntaxError("cannot read the sidecar", got="nested brackets", needed="one JSON object") from None
    except ValueError as error:  # also bytes that are no text, and numbers of thousands of digits
        raise PlanSyntaxError("cannot read the sidecar", got=error, needed="one JSON object") from None
    if not isinstance(fields, dict) or fields.keys() - {"torch"} != _TYPES.keys():
        got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise PlanSyntaxError("cannot read the sidecar", got=got, needed=f"an object with the keys {sorted(_TYPES)}")

    def wrong(name: str, needed: str) -> PlanSyntaxError:
        shown = repr(fields[name])
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return PlanSyntaxError(f"cannot read {name!r} of the sidecar", got=shown, needed=needed)

    for name, needed in _TYPES.items():
        if type(fields[name]) is not needed:  # a bool is an int to isinstance
            raise wrong(name, needed.__name__)
    if fields["pipex plan"] != 1:
        raise wrong("pipex plan", "1")
    for name, legal in (("placement", PlacementName), ("update", Update), ("torch", Versions)):
        if name in fields and fields[name] not in (known := get_args(legal)):
            raise wrong(name, f"one of {', '.join(known)}")
    if any(type(peak) is not int or peak < 0 for peak in fields["peak_activations"]):
        raise wrong("peak_activations", "numbers, at least 0")
    return fields


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key stands twice")
    return fields
