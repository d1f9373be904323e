"""How Sphinx builds these pages; ``make docs`` calls it, warnings are errors.

Nothing is fetched: references to torch are not looked up (no intersphinx), so they are on the
list of what the nitpicky mode may leave open.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any, cast

from docutils.nodes import Element, TextElement
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rfcompile  # noqa: E402  (from these sources, whatever is installed)

project = "rfcompile"
author = "The rfcompile authors"
project_copyright = "the rfcompile authors, Apache-2.0"
release = version = rfcompile.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "rfcompile"
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_type_aliases = {name: name for name in ("Formatish", "Policyish", "Modules")}

nitpicky = True
nitpick_ignore_regex = [
    # Other projects, whose inventories a build without a network does not have.
    (r"py:.*", r"(torch|nn|fx|dist|np|numpy|collections|typing|pathlib|os)\..*"),
    (r"py:.*", r"(Tensor|DistributedDataParallel|PathLike|Path|Module|ProcessGroup)"),
    (r"py:.*", r"(Any|Callable|Iterable|Iterator|Mapping|Sequence|Literal|TracebackType)"),
]

PUBLIC = ("rfcompile", *(f"rfcompile.{name}" for name in rfcompile._PACKAGES if name != "errors"))
"""The modules that users import from; the first that has a name documents it."""


def public_names() -> dict[str, set[str]]:
    """Every name of a public object -> the names that it may be documented by.

    Files may move, doors do not: a reference by the file leads to the door.
    """
    found: dict[str, set[str]] = {}
    for door in PUBLIC:
        module = importlib.import_module(door)
        for name in module.__all__:
            value = getattr(module, name)
            home = f"{getattr(value, '__module__', door)}.{getattr(value, '__qualname__', name)}"
            names = found.setdefault(home, {home})
            names.add(f"{door}.{name}")
            found[f"{door}.{name}"] = names
    return found


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: TextElement
) -> Element | None:
    """A reference by the file in which something is defined leads to its public name."""
    if node.get("refdomain") != "py":
        return None
    names, target = public_names(), node["reftarget"]
    owner, _, member = target.rpartition(".")
    candidates = [*names.get(target, ()), *(f"{name}.{member}" for name in names.get(owner, ()))]
    domain: Any = env.get_domain("py")
    for name in candidates:
        found = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)
        if found is not None:
            return cast(Element, found)
    return contnode if is_internal(target) else None  # shown, but not linked


def is_internal(target: str) -> bool:
    """Whether a file of the package defines the name: a misspelt one is still a warning."""
    if "." not in target:
        files = [m for name, m in sys.modules.items() if name.startswith("rfcompile.")]
        return any(target in vars(module) for module in files)
    if not target.startswith("rfcompile."):
        return False
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def raises_as_list(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """One bullet an error, each with a link: our docstrings put several sentences on a line."""
    starts = [i for i, line in enumerate(lines) if re.fullmatch(r"\s*Raises( \(.*\))?:", line)]
    for start in reversed(starts):
        margin = len(lines[start]) - len(lines[start].lstrip())
        end = start + 1
        while end < len(lines) and (
            not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > margin
        ):
            end += 1
        text = "\n".join(line.strip() for line in lines[start + 1 : end]).strip()
        entries = re.split(rf"(?<=[.;])\s(?={ERROR})|\n(?={ERROR}[,:])", text)
        bullets = [f"* {re.sub(ERROR, link, ' '.join(entry.split()))}" for entry in entries]
        heading = lines[start].strip().rstrip(":")
        lines[start:end] = ["", f".. rubric:: {heading}", "", *bullets, ""]


ERROR = r"(?<![`.\w])[A-Z]\w*Error\b"


def link(match: re.Match[str]) -> str:
    name = match[0]
    return f":exc:`~rfcompile.errors.{name}`" if hasattr(rfcompile.errors, name) else f"``{name}``"


def short_types(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    result: str | None,
) -> tuple[str, str | None] | None:
    """An alias inside of another type is written by its name, too."""
    long = r"TypeAliasForwardRef\('(\w+)'\)"
    return (re.sub(long, r"\1", signature), result) if signature else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-signature", short_types)
    app.connect("autodoc-process-docstring", raises_as_list, priority=400)  # napoleon's is 500
    return {"parallel_read_safe": True}
