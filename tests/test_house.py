"""The shape of the package: its public names, and arrows that point down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import pipex

ROOT = Path(pipex.__file__).parent


# package -> packages of pipex that it may import (arrows point down only)
MAY_IMPORT = {
    "errors": set(),
    "events": set(),
    "reading": set(),
    "torch_internals": {"errors"},
    "hugging_face": {"errors", "reading"},
    "plan": {"errors", "events", "reading", "_native"},
    "backward": {"errors", "reading", "torch_internals", "triton_kernels", "_cuda"},
    "transport": {"errors", "torch_internals", "_native"},
    "triton_kernels": {"errors", "_cuda"},
    "layout": {"errors", "plan"},
    "partition": {"errors", "torch_internals", "hugging_face", "backward", "plan", "layout"},
    "state": {"errors", "reading"},
    "observe": {"errors", "events", "reading", "plan"},
    "runtime": {
        "errors",
        "events",
        "torch_internals",
        "hugging_face",
        "plan",
        "layout",
        "backward",
        "transport",
        "partition",
        "state",
        "observe",
    },
    "models": {"errors"},
    "bench": {
        "errors",
        "torch_internals",
        "plan",
        "backward",
        "triton_kernels",
        "partition",
        "observe",
        "runtime",
        "transport",
        "models",
    },
    # Commands know no transport and no Triton kernel.
    "cli": {
        "errors",
        "reading",
        "plan",
        "backward",
        "partition",
        "state",
        "observe",
        "runtime",
        "models",
        "bench",
        "_cuda",
        "_native",
    },
}


def sources(package: str) -> list[Path]:
    folder = ROOT / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{package}.py"]


def files(*suffixes: str) -> list[Path]:
    """Of the whole package, folder by folder: ``rglob`` does not enter those that are links (bench, triton_kernels)."""
    folders = [path.parent for path in ROOT.glob("*/__init__.py")]
    everything = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    return sorted(path for path in everything if path.suffix in suffixes)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"pipex.{alias.name}" for alias in node.names} if module == "pipex" else {module}
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows_point_down(package: str) -> None:
    for path in sources(package):
        for name in imports(path):
            if name.startswith("pipex."):
                target = name.split(".")[1]
                assert target in MAY_IMPORT[package] | {package, "__version__"}, f"{path} imports {name}"


def test_no_file_holds_two_ideas() -> None:
    """A file past 400 lines does."""
    for path in files(".py", ".pyi", ".js", ".css"):
        assert path.read_text().count("\n") <= 400, path


def test_what_need_not_be_installed_is_imported_where_it_is_used() -> None:
    """Not when a module is imported, which is when a plain model is trained too."""
    for path in files(".py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                )
                assert not {name.partition(".")[0] for name in names} & {"transformers", "peft", "datasets"}, path


def test_every_package_is_in_the_table() -> None:
    top = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files(".py")}
    assert top == set(MAY_IMPORT) | {"__init__", "__main__"}
    assert {path for package in MAY_IMPORT for path in sources(package)} <= set(files(".py"))


def test_files_that_users_name_are_opened_in_one_place() -> None:
    """A path may lead to a pipe, at whose opening a program waits for ever. What is left opens what pipex writes, or
    what is its own, Python's or the kernel's."""
    opened = set()
    for package in set(MAY_IMPORT) - {"reading", "bench"}:  # benchmarks read what they have written, and /proc
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name = ast.unparse(node.func)
                mode = next((a.value for a in node.args[1:2] if isinstance(a, ast.Constant)), "r")
                if name.endswith(("read_text", "read_bytes")) or (name == "open" and "r" in str(mode)):
                    opened.add(str(path.relative_to(ROOT)))
    assert opened <= {
        "backward/tuning.py",  # its own sources
        "cli/train/data.py",  # the standard library
        "plan/view/html.py",  # its own style
        "partition/room.py",  # /proc
        "transport/group/world.py",  # /proc
    }


def test_plan_imports_the_standard_library_only() -> None:
    for path in sources("plan"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names | {"pipex"}, f"{path} imports {name}"


def test_planning_does_not_import_torch() -> None:
    code = "import sys, pipex; pipex.build('1f1b', 2, 4); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_that_a_peer_or_a_file_sends_is_executed() -> None:
    banned = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}
    for path in files(".py"):
        assert not {name.split(".")[0] for name in imports(path)} & banned, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load"}, f"{path}:{node.lineno}"
                assert "object_list" not in called, f"{path}:{node.lineno}"
                assert "gather_object" not in called, f"{path}:{node.lineno}"


def test_private_names_of_torch_and_transformers_are_used_in_one_place_each() -> None:
    """A name that begins with an underscore is somebody else's, unless it is one of ours on ``self``, ``cls`` or what
    was imported from pipex."""
    trees = {path: ast.parse(path.read_text()) for path in files(".py")}
    documented = {"_asdict", "_fields", "_replace", "_exit"}  # a named tuple's and os's
    ours = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                name = node.id if isinstance(node, ast.Name) else node.attr
                of_self = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
                if isinstance(node, ast.Name) or of_self:
                    ours.add(name)
    for path, tree in trees.items():
        if path.name == "torch_internals.py" or path.parent.name == "hugging_face":
            continue
        own = {"self", "cls"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pipex"):
                own |= {alias.asname or alias.name for alias in node.names}
        for node in ast.walk(tree):
            found = [node.attr] if isinstance(node, ast.Attribute) else []
            of_own = isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[0] in own
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or ""
                names = [alias.name for alias in node.names]
                others = not (module or names[0]).startswith(("pipex", "triton"))  # the tools of Triton are Triton's
                found = [part for name in (module, *names) for part in name.split(".") if others]
            for name in found:
                private = name.startswith("_") and not name.endswith("__")
                known = name in documented or (of_own and name in ours)
                assert not private or known, f"{path}:{node.lineno} uses {name}"


def test_public_names() -> None:
    assert set(pipex.__all__) == {
        "LayerCosts", "Pipeline", "PipexError", "Whole", "__version__", "build", "build_stages", "current_world",
        "drop_in", "empty_model", "errors", "launch", "plan", "profile_layers", "search", "split_model",
        "stage_backward", "stage_backward_input", "stage_backward_weight",
    }  # fmt: skip
    for name in pipex.__all__:
        assert getattr(pipex, name) is not None
    code = "import pipex; pipex.plan.RankCosts.of(2); pipex.errors.PipexError"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pipex.nothing  # noqa: B018


def test_version_is_the_distribution_s() -> None:
    from importlib.metadata import version

    assert version("pipex-torch") == pipex.__version__


def test_the_runtime_does_not_ask_which_transport_it_has() -> None:
    for path in sources("runtime"):
        tree = ast.parse(path.read_text())
        from_transport = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pipex.transport")
            for alias in node.names
        }
        for node in ast.walk(tree):
            names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            if (isinstance(node, ast.Call) and ast.unparse(node.func) in {"isinstance", "issubclass"}) or (
                isinstance(node, ast.Compare) and "type" in names
            ):
                assert not names & from_transport, f"{path}:{node.lineno}"


# Circles of imports.


def modules() -> dict[str, ast.Module]:
    """Every module of the package by name; of a native one its stub."""
    found = {}
    for path in files(".py", ".pyi"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imported(source: ast.Module, known: Iterable[str]) -> set[str]:
    """The modules that a module names in its imports, those for type checkers and inside of functions included."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found & set(known)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of several nodes that all reach each other."""

    def reached_from(node: str) -> set[str]:
        seen: set[str] = set()
        todo = [node]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    reach = {node: reached_from(node) for node in graph}
    together = {frozenset({node} | {other for other in reach[node] if node in reach[other]}) for node in graph}
    return sorted(sorted(circle) for circle in together if len(circle) > 1)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also not for their types: who reads one of them would have to read all. The public names of ``pipex`` itself are
    left out: its ``__init__`` imports nothing before it is asked for."""
    known = modules()
    graph = {name: imported(source, known) if name != "pipex" else set() for name, source in known.items()}
    assert circles(graph) == []


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}}, [["a", "b"]]),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"c"}}, [["b", "c"]]),
        ({"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"c"}, "e": {"a"}}, [["a", "b"], ["c", "d"]]),
        ({"a": {"a"}}, []),
    ],
)
def test_a_circle_is_found(graph: dict[str, set[str]], expected: list[list[str]]) -> None:
    assert circles(graph) == expected


def test_an_import_is_of_the_module_that_is_named() -> None:
    source = "import pipex.a\nif T:\n    from pipex.b import name, c\ndef f():\n    from pipex import d, other"
    known = {"pipex", "pipex.a", "pipex.b", "pipex.b.c", "pipex.d", "pipex.e"}
    assert imported(ast.parse(source), known) == {"pipex.a", "pipex.b", "pipex.b.c", "pipex.d", "pipex"}
