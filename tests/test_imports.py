"""What the packages import of each other, and what an installed wheel names and offers."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sekd_fairseq", "analysis")


def modules() -> dict[str, Path]:
    """The files of the packages by the name that each is imported by."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """The packages' modules that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            inside = [name for name in submodules if name in known]
            names = inside if len(inside) == len(submodules) else [*inside, str(node.module)]
        yield from known.intersection(names)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The names on one circle of a graph; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in sorted(graph))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    files = {name: path for name, path in modules().items() if name.startswith(package)}
    graph = {name: set(imported(path, set(files))) - {name} for name, path in files.items()}
    assert not (found := circle(graph)), " -> ".join(found)


def test_the_analysis_never_imports_the_plugin() -> None:
    files = modules()
    for name, path in files.items():
        if name.startswith("analysis"):
            found = [other for other in imported(path, set(files)) if other.startswith("sekd")]
            assert not found, f"{name} imports {found}"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_wheel_names_only_what_it_holds(package: str) -> None:
    """What lies in the repository's scripts is not installed."""
    for path in (ROOT / package).rglob("*.py"):
        content = path.read_text(encoding="utf-8")
        assert not re.search(r"\bscripts/", content), path
        for name in re.findall(r"python -m ((?:sekd_fairseq|analysis)(?:\.\w+)*)", content):
            assert name in modules(), f"{path}: {name}"


def test_every_command_has_an_entry_point() -> None:
    written = (ROOT / "setup.py").read_text(encoding="utf-8")
    points = dict(re.findall(r'"([\w-]+) = ([\w.]+):main"', written))
    for name, module in points.items():
        assert name.replace("-", "_") in (module.replace(".", "_"), f"sekd_{module.split('.')[-1]}")
        assert callable(importlib.import_module(module).main)
    commands = {name for name, path in modules().items() if "\ndef main(" in path.read_text()}
    assert commands == set(points.values())


def test_every_module_is_described_in_its_first_line() -> None:
    for name, path in modules().items():
        described = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = described.partition("\n")[0]
        assert len(first) >= 20, f"{name}: {first!r}"
