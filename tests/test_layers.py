"""The rooms of the package, in order: each may import those before it, never a later one.

A new room or a new file at the top must be placed in ROOMS. The sources are read, not imported, so
that imports inside functions count too.
"""

from __future__ import annotations

import ast
import re
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
    ("planning",),
    ("states",),
    ("inductor",),
    ("emission",),
    ("distributed",),
    ("training",),
    ("integrations",),
    # The doors; "" is rfcompile/__init__.py, which lists the public names.
    ("adapters", "low_rank", "experimental", "analyze", "api", "explain", "kernels", "cli", ""),
)
PRIVATE_TORCH: dict[str, tuple[str, ...]] = {
    "torch_versions": ("distributed._functional_collectives",),
    "codec": ("_ops", "_inductor.codecache.CppCodeCache"),
    "wire": ("_C", "_dispatch", "_subclasses", "testing._internal"),
    "nn": ("utils._python_dispatch",),
    "graph": (
        *("_C", "_dynamo", "_logging", "_subclasses"),
        "distributed.distributed_c10d._resolve_process_group",
    ),
    "find": ("distributed._functional_collectives",),
    "report": ("_dynamo", "_guards"),
    "rewrites": ("_dynamo",),
    "inductor": ("_functorch", "_inductor", "utils._python_dispatch"),
    "emission": ("_dynamo", "_guards", "_inductor", "_subclasses", "utils._triton"),
    "distributed": (
        "distributed.fsdp._fully_shard",
        "distributed.pipelining.stage._PipelineStageBase",
        "distributed.pipelining.stage._normalize_model_output_as_tuple",
    ),
}
"""Which room may use which private parts of torch; docs/internals/private-torch.md says why."""
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


def top_of(module: str) -> str:
    return module.removeprefix("rfcompile").lstrip(".").split(".")[0]


def room_of(module: str) -> int:
    top = top_of(module)
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
            if chain.startswith("torch._"):
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


IN_MANY_FILES = re.compile(r"torch\.(_ops(\.[A-Z]\w+)?|utils\._pytree(\.\w+)?|ops(\..+)?)")


def private_names(tree: ast.AST) -> set[str]:
    """What a source names of torch that has a part with an underscore."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    private = re.compile(r"torch\.([\w.]*\.)?_[a-zA-Z][\w.]*")
    return {n for n in names if private.fullmatch(n) and not IN_MANY_FILES.fullmatch(n)}


def is_allowed(room: str, name: str) -> bool:
    parts = tuple(f"torch.{part}" for part in PRIVATE_TORCH.get(room, ()))
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def test_rooms_use_their_own_private_parts_of_torch() -> None:
    wrong = [
        f"{module} uses {name}"
        for module, path in MODULES.items()
        for name in sorted(private_names(ast.parse(path.read_text())))
        if not is_allowed(top_of(module), name)
    ]
    assert not wrong, f"{wrong}: use a public part, or add it to PRIVATE_TORCH and to the page"


def test_what_a_room_no_longer_uses_is_no_longer_allowed() -> None:
    used: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        used.setdefault(top_of(module), set()).update(private_names(ast.parse(path.read_text())))
    idle = [
        f"{part} of {room}"
        for room, parts in PRIVATE_TORCH.items()
        for part in parts
        if not any(f"{name}.".startswith(f"torch.{part}.") for name in used.get(room, ()))
    ]
    assert not idle


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


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from torch._dynamo import config", {"torch._dynamo.config"}),
        ("import torch\ntorch._C.x", {"torch._C.x", "torch._C"}),
        ("from torch._ops import OpOverload\nfrom torch import nn", set()),
        ("from torch._ops import _OpNamespace", {"torch._ops._OpNamespace"}),
    ],
)
def test_private_names_are_seen(source: str, found: set[str]) -> None:
    assert private_names(ast.parse(source)) == found


def test_backwards_means_a_later_room() -> None:
    assert is_backwards("rfcompile.codec.arithmetic", "rfcompile.cli")
    assert is_backwards("rfcompile.passes.merge_collectives", "rfcompile.inductor.backend")
    assert is_backwards("rfcompile.errors", "rfcompile")
    assert not is_backwards("rfcompile.codec.operators", "rfcompile.codec.arithmetic")
    assert not is_backwards("rfcompile.passes", "rfcompile.report.measures")
