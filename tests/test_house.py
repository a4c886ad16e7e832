"""The house: imports run downward, SQL stands in storage, files and functions can be read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.server import ROOT

WEBAPP = ROOT / "webapp"
GROUND = ("config", "signing", "logs", "refusals")
PARSES = ("config", "webapp.rules.pipeline")  # which is pure, and itself imports nothing of ours
FLOORS = ("rules", "storage", "page", "streams", "github")  # each may import those before it
DOORS = ("callbacks", "watch", "operator", "api")
MAY_NOT = {"page": {"streams", "github"}, "streams": {"github"}, "github": {"page", "streams"}}
SQL = {"select", "insert", "update", "delete", "func", "text", "tuple_", "literal", "exists"}


def modules() -> Iterator[tuple[str, ast.Module, Path]]:
    for path in sorted(WEBAPP.rglob("*.py")):
        if "migrations" not in path.parts:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name, ast.parse(path.read_text()), path


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of each import from somewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.module, alias.name


def floor(module: str) -> str:
    return module.removeprefix("webapp.").partition(".")[0]


def test_imports_run_downward_and_doors_import_no_doors() -> None:
    for name, tree, _ in modules():
        here = floor(name)
        for module, what in imports(tree):
            if not module.startswith("webapp"):
                continue
            there = floor(module) if module != "webapp" else what
            if here in GROUND:
                assert there in GROUND or (here, module) == PARSES, (name, module)
            if here in FLOORS:
                allowed = {*GROUND, *FLOORS[: FLOORS.index(here) + 1]} - MAY_NOT.get(here, set())
                assert there in allowed, (name, module)
            if here == "routes" and there == "routes" and name.rpartition(".")[2] in DOORS:
                assert what not in DOORS and module.rpartition(".")[2] not in DOORS, (name, module, what)


def test_sql_stands_in_storage_alone() -> None:
    for name, tree, _ in modules():
        if floor(name) not in ("storage", "check"):
            taken = {what for module, what in imports(tree) if module.startswith("sqlalchemy")}
            assert not taken & SQL, (name, taken & SQL)


def test_a_file_has_at_most_300_lines_and_a_function_40() -> None:
    for name, tree, path in modules():
        assert len(path.read_text().splitlines()) <= 300, name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 40, (name, node.name)


def test_a_tests_name_is_a_promise_of_at_most_70_characters() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        tests = [name for name in names if name.startswith("test_")]
        assert [name for name in tests if len(name) > 70] == [], path
        assert len(tests) == len(set(tests)), f"{path} has a name twice, and the first is never run"
