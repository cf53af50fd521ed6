"""The house: folders import only from those before them, nothing imports itself in a circle, the engine no Dagster."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "twhin_pipeline"

ORDER = (
    "words",
    "config",
    "store",
    "tracking",
    "kernels",
    "graph",
    "training_set",
    "spark",
    "model",
    "sharding",
    "vectors",
    "evaluation",
    "training",
    "launchers",
    "checks",
    "lifecycle",
    "views",
    "stages",
    "operations",
    "serving",
    "entry",
    "cli",
)
"""Folders in the order in which data flows; `words` and `entry` are modules beside them, `cli` is the way in."""
WORDS = ("bundled", "errors", "extras", "interrupts", "prefetch", "registry", "remote", "scratch", "words")
"""Modules that everyone may import."""


def modules() -> list[str]:
    """Return the engine's modules, such as `graph.scan`; a package is its `__init__`."""
    paths = (path.relative_to(ENGINE).with_suffix("") for path in ENGINE.rglob("*.py"))
    return sorted(".".join(part for part in path.parts if part != "__init__") for path in paths)


def file_of(module: str) -> Path:
    path = ENGINE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def imports(module: str) -> frozenset[str]:
    """Return the full names that a module imports at run time, in functions too; those for type checkers left out."""
    tree = ast.parse(file_of(module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            named |= inner if node.module == "twhin_pipeline" else {node.module} | inner
    return frozenset(named)


def ours(module: str) -> set[str]:
    """Return the engine's modules that a module imports."""
    known = set(modules())
    return {name.removeprefix("twhin_pipeline.") for name in imports(module)} & known - {module}


def place(module: str) -> int:
    """Return the position of a module's folder in the order."""
    folder, _, rest = module.partition(".")
    if rest or (ENGINE / folder).is_dir():
        return ORDER.index(folder)
    return ORDER.index("words" if folder in WORDS else "entry")


@pytest.mark.parametrize("module", [name for name in modules() if name])
def test_a_module_imports_only_from_its_own_folder_and_those_before_it(module: str) -> None:
    later = [name for name in ours(module) if place(name) > place(module)]
    assert not later


def test_no_module_imports_itself_in_a_circle() -> None:
    # A package's own `__init__` gathers names of its modules, which do not import it back.
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in sorted(ours(module)):
                visit(name, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def test_only_definitions_imports_dagster() -> None:
    with_dagster = {name for name in modules() if any(one.split(".")[0] == "dagster" for one in imports(name))}
    assert with_dagster == {"definitions"}


def test_the_dagster_side_has_a_name_in_the_package_and_no_code_there() -> None:
    # Its folders are at the top of the repository; a wheel holds them where the links are.
    links = {path.name: path.resolve() for path in (ENGINE / "_dagster").iterdir() if path.is_symlink()}
    assert links == {name: ROOT / name for name in ("assets", "resources")}
    files = {path.name for path in (ENGINE / "_dagster").glob("*.py")}
    assert files == {"__init__.py"}
    users = {name for name in modules() if any("_dagster" in one for one in imports(name))}
    assert users == {"definitions"}


def test_every_folder_is_in_the_order_and_says_what_it_is_for() -> None:
    folders = {path.parent.name for path in ENGINE.glob("*/__init__.py")} - {"_dagster"}
    assert folders == set(ORDER) - {"words", "entry"}
    for folder in folders:
        assert ast.get_docstring(ast.parse((ENGINE / folder / "__init__.py").read_text()))


def test_tests_mirror_the_folders() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert set(ORDER) - folders <= {"words", "entry"}
    assert folders - set(ORDER) <= {"assets", "benchmarks", "e2e", "packaging", "scripts"}


def test_names_of_test_files_are_unique() -> None:
    """pytest imports them by their names alone; of two files of one name it collects neither."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name in set(names) if names.count(name) > 1] == []
