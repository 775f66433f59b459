"""The parameter layout is the one that Triton's code reads: compared with the parameter lists in its PTX.

`triton_layouts.jsonl` holds what Triton 3.6.0 and 3.9.0 generated, one kernel a line; where a Triton is installed, it
is asked too.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pipex.errors import InputError

_cuda = pytest.importorskip("pipex._cuda", reason="built without CUDA kernels")
from pipex.triton_kernels import compiled  # noqa: E402

HERE = Path(__file__).parent
RECORDED = [json.loads(line) for line in (HERE / "triton_layouts.jsonl").read_text().splitlines()]
SIZE = {".u32": 4, ".f32": 4, ".u64": 8}


def tuples(signature: Any) -> Any:
    """JSON has made lists of them."""
    return tuple(map(tuples, signature)) if isinstance(signature, list) else signature


def layout_of_ptx(parameters: list[str]) -> list[tuple[int, int]]:
    """Offsets and sizes, each parameter at its alignment, as the PTX manual lays down."""
    fields = []
    offset = 0
    for parameter in parameters:
        if tensor_map := re.fullmatch(r"\.param \.align (\d+) \.b8 \w+\[(\d+)\]", parameter):
            alignment, size = map(int, tensor_map.groups())
        else:
            scalar = re.fullmatch(r"\.param (\.\w+)( \.ptr \.global \.align 1)? \w+", parameter)
            assert scalar, parameter
            alignment = size = SIZE[scalar[1]]
        offset = -(-offset // alignment) * alignment
        fields.append((offset, size))
        offset += size
    return fields


def check(facts: dict[str, Any]) -> None:
    signature = {name: tuples(kind) for name, kind in facts["signature"].items()}
    parameters = compiled.parameters(signature, facts["tensordesc_meta"])
    assert _cuda.parameter_layout(parameters) == layout_of_ptx(facts["ptx"])


@pytest.mark.parametrize("facts", RECORDED, ids=lambda facts: f"{facts['triton']}-{facts['name']}")
def test_layout_is_that_of_recorded_code(facts: dict[str, Any]) -> None:
    check(facts)


def test_every_kind_was_recorded_from_both_versions() -> None:
    by_version = {
        version: [facts for facts in RECORDED if facts["triton"] == version] for version in ("3.6.0", "3.9.0")
    }
    for recorded in by_version.values():
        kinds = {kind for facts in recorded for kind in compiled.flat(tuples(list(facts["signature"].values())))}
        assert {"i32", "i64", "fp32", "*fp32", "tensordesc<fp32[64]>", "tensordesc<bf16[64,64]>"} < kinds
        assert any("[1,64,64]" in kind for kind in kinds)
    assert [facts["ptx"] for facts in by_version["3.6.0"]] == [facts["ptx"] for facts in by_version["3.9.0"]]


def live() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    spec = importlib.util.spec_from_file_location("triton_layouts", HERE / "triton_layouts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_layouts"] = module  # triton.jit looks its functions' source up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_layout_is_that_of_the_installed_triton() -> None:
    layouts = live()
    for kernel in layouts.compiled():
        compiled.check(kernel.metadata)
        check(json.loads(json.dumps(layouts.facts(kernel))))


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("num_ctas", 2),
        ("global_scratch_size", 128),
        ("profile_scratch_size", 8),
        ("launch_pdl", True),
        ("launch_cooperative_grid", True),
    ],
)
def test_kernels_that_need_more_than_a_plain_launch_are_refused(fact: str, value: object) -> None:
    plain = {
        "name": "work", "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False,
        "global_scratch_size": 0, "profile_scratch_size": 0,
    }  # fmt: skip
    compiled.check(SimpleNamespace(**plain))
    with pytest.raises(InputError, match=f"kernel work cannot be launched without Triton: {fact}; got {value}"):
        compiled.check(SimpleNamespace(**{**plain, fact: value}))


def test_parameters_that_the_launcher_does_not_know_are_refused() -> None:
    with pytest.raises(InputError, match="got fp64"):
        compiled.parameters({"x": "fp64"}, [])
    with pytest.raises(InputError, match="not a plain tile"):  # code for sm_80: no tensor maps
        compiled.parameters({"x": "tensordesc<fp32[64,64]>"}, [])


def test_element_types_are_told_to_the_driver_in_its_own_numbers() -> None:
    # cuda.h: UINT8 0 … FLOAT16 6, FLOAT32 7, FLOAT64 8, BFLOAT16 9. In Triton's metadata bf16 is 10.
    of = {facts["signature"]["x"]: facts for facts in RECORDED if facts["name"] == "mixed"}
    assert {meta["elem_type"] for meta in of["tensordesc<bf16[64,64]>"]["tensordesc_meta"]} == {10, 7}
    assert compiled.ELEMENT_TYPE_OF_DRIVER[10] == 9
    assert compiled.ELEMENT_TYPE_OF_DRIVER[6] == 6
    assert compiled.ELEMENT_TYPE_OF_DRIVER[7] == 7
