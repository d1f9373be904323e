"""The rooms of the package, in order: each may import those before it, never a later one.

A new room or a new file at the top must be placed in ROOMS. The sources are read, not imported, so
that imports inside functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent

ROOMS: tuple[tuple[str, ...], ...] = (
    ("errors", "torch_versions"),
    ("codec",),
    ("wire",),
    ("nn",),
    ("graph",),
    ("find",),
    ("report",),
    ("passes",),
    ("rewrites",),
    ("states",),
    ("inductor",),
    ("distributed",),
    ("training",),
    # The doors; "" is rfcompile/__init__.py, which lists the public names.
    ("adapters", "low_rank", "experimental", "analyze", "api", "explain", "cli", ""),
)
INDUCTOR = ("torch._inductor", "torch._functorch")
MAX_LINES = 480  # a file is as long as its one idea; functions are what must be short


def modules() -> dict[str, Path]:
    """Dotted name and file of every module of both packages (the link passes -> ../passes once)."""
    found = {}
    for folder, prefix in (("rfcompile", "rfcompile"), ("passes", "rfcompile.passes")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "rfcompile" and parts[0] == "passes":
                continue
            name = ".".join([prefix, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def room_of(module: str) -> int:
    top = module.removeprefix("rfcompile").lstrip(".").split(".")[0]
    for room, names in enumerate(ROOMS):
        if top in names:
            return room
    raise AssertionError(
        f"{module} has no room: place {top!r} in ROOMS of {Path(__file__).name}, as early as its "
        "imports allow."
    )


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Every dotted name a source imports, at any depth, also by attribute and by string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, base]).rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            chain = ast.unparse(node)
            if chain.startswith(INDUCTOR):
                yield chain
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            strings = (a.value for a in node.args if isinstance(a, ast.Constant))
            yield from (s for s in strings if isinstance(s, str))


def owner_of(name: str) -> str:
    """The module that a dotted name such as ``rfcompile.wire.cost.sent_bytes`` lives in."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


def edges() -> Iterator[tuple[str, str]]:
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(), str(path))
        for name in imported_names(tree, module, path.name == "__init__.py"):
            if name.split(".")[0] == "rfcompile" and owner_of(name) != module:
                yield module, owner_of(name)


def is_backwards(module: str, imported: str) -> bool:
    return room_of(imported) > room_of(module)


def test_every_module_has_a_room() -> None:
    assert len(MODULES) > 5
    for module in MODULES:
        room_of(module)


def test_imports_run_one_way() -> None:
    wrong = [f"{a} imports {b}" for a, b in sorted(set(edges())) if is_backwards(a, b)]
    assert not wrong, "against the direction of ROOMS: " + "; ".join(wrong)


def test_imports_have_no_cycle() -> None:
    # A package's __init__ is imported before its modules, whoever asks: that is no import of ours.
    graph = nx.DiGraph((a, b) for a, b in edges() if not a.startswith(b + "."))
    cycles = [" -> ".join(cycle) for cycle in nx.simple_cycles(graph)]
    assert not cycles, f"modules import one another in a circle: {cycles}"


def test_only_one_room_uses_inductor() -> None:
    users = {
        module
        for module, path in MODULES.items()
        for name in imported_names(ast.parse(path.read_text()), module, False)
        if name.startswith(INDUCTOR)
    }
    wrong = sorted(m for m in users if not m.startswith("rfcompile.inductor."))
    assert not wrong, f"{wrong} use {INDUCTOR}; only rfcompile/inductor/ may"


def test_modules_stay_short() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    long = {module: n for module, n in lines.items() if n > MAX_LINES}
    assert not long, f"split what is above {MAX_LINES} lines: {long}"


# ---- the checks above can fail -------------------------------------------------------------------


def test_an_unknown_module_is_told_its_place() -> None:
    with pytest.raises(AssertionError, match=r"rfcompile\.surprise has no room: place 'surprise'"):
        room_of("rfcompile.surprise")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import rfcompile.cli", "rfcompile.cli"),
        ("from rfcompile import cli as c", "rfcompile.cli"),
        ("from rfcompile.cli import main", "rfcompile.cli.main"),
        ("from . import cli", "rfcompile.cli"),
        ("from .cli import main", "rfcompile.cli.main"),
        ("def f():\n    from rfcompile import cli", "rfcompile.cli"),
        ("import importlib\nimportlib.import_module('rfcompile.cli')", "rfcompile.cli"),
        ("import torch\nx = torch._inductor.config", "torch._inductor.config"),
        ("from torch import _inductor", "torch._inductor"),
    ],
)
def test_every_way_to_import_is_seen(source: str, expected: str) -> None:
    assert expected in set(imported_names(ast.parse(source), "rfcompile.api", False))


def test_backwards_means_a_later_room() -> None:
    assert is_backwards("rfcompile.codec.arithmetic", "rfcompile.cli")
    assert is_backwards("rfcompile.passes.merge_collectives", "rfcompile.inductor.backend")
    assert is_backwards("rfcompile.errors", "rfcompile")
    assert not is_backwards("rfcompile.codec.operators", "rfcompile.codec.arithmetic")
    assert not is_backwards("rfcompile.passes", "rfcompile.report.measures")
