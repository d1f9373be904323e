"""The command line: ``rfcompile explain`` and ``rfcompile diff`` on MODULE:FACTORY.

Results go to stdout, everything else to stderr. Exit codes:

==== ================================================ =========================================
code explain                                          diff
==== ================================================ =========================================
0    every eligible site is quantized                 the graph changed
1    an eligible site stays exact, or there is none   the graph did not change
2    the command line is wrong                        the command line is wrong
3    an error of this package, printed to stderr      an error of this package, printed to stderr
==== ================================================ =========================================
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from rfcompile import api
from rfcompile.capture import inputs_of
from rfcompile.errors import RFCompileError, TargetError
from rfcompile.fingerprint import package_version
from rfcompile.formats import as_format
from rfcompile.policy import Policy
from rfcompile.process_groups import simulated


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except (RFCompileError, NotImplementedError) as error:
        print(f"rfcompile: {error}", file=sys.stderr)
        return 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rfcompile",
        description="Quantized collectives inserted by the compiler into unmodified models.",
    )
    parser.add_argument("--version", action="version", version=f"rfcompile {package_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    explain = commands.add_parser("explain", help="which sites are quantized, why not the rest")
    explain.set_defaults(command=_explain)
    diff = commands.add_parser("diff", help="the graph before and after")
    diff.set_defaults(command=_diff)
    for command in (explain, diff):
        command.add_argument(
            "target",
            metavar="MODULE:FACTORY",
            help="a function without arguments that returns a model, (model, args) or "
            "(model, args, kwargs); MODULE is importable or a path to a .py file",
        )
        command.add_argument(
            "--bits",
            dest="format",
            metavar="FORMAT",
            default="4",
            help='bits, or a format such as "4b:g64:h32" (default: 4)',
        )
        command.add_argument("--min-bytes", type=int, default=0, help="smaller ones stay exact")
        command.add_argument(
            "--world-size",
            type=int,
            default=1,
            help="for a model with collectives: simulate this many ranks while FACTORY and the "
            "model run; nothing is sent",
        )
        command.add_argument(
            "--boundaries", default="auto", help='"auto", "branches", or module paths with commas'
        )
        command.add_argument("--json", action="store_true", help="print JSON")
    diff.add_argument("--html", type=Path, metavar="FILE", help="also write a page to FILE")
    return parser


def _explain(args: argparse.Namespace) -> int:
    with _ranks(args):
        model, inputs, kwargs = _load(args.target)
        report = api.explain(
            model, *inputs, kwargs=kwargs, policy=_policy(args), boundaries=_boundaries(args)
        )
    print(report.json() if args.json else report.text())
    return 1 if not report.sites or any(site.eligible for site in report.skipped) else 0


def _diff(args: argparse.Namespace) -> int:
    with _ranks(args):
        model, inputs, kwargs = _load(args.target)
        if args.world_size > 1:
            result = api.diff(api.explain(model, *inputs, kwargs=kwargs, policy=_policy(args)))
        else:
            after = api.transform(model, policy=_policy(args), boundaries=_boundaries(args))
            result = api.diff(model, after, example_inputs=(inputs, kwargs))
    print(result.json() if args.json else result.text())
    if args.html:
        args.html.write_text(result.html(), encoding="utf-8")
        print(f"rfcompile: wrote {args.html}", file=sys.stderr)
    return 0 if result.changed else 1


def _ranks(args: argparse.Namespace) -> AbstractContextManager[None]:
    return simulated(args.world_size) if args.world_size > 1 else nullcontext()


def _policy(args: argparse.Namespace) -> Policy:
    fmt = as_format(int(args.format) if args.format.isdigit() else args.format)
    return Policy(fmt, fmt, fmt, fmt, min_bytes=args.min_bytes)


def _boundaries(args: argparse.Namespace) -> str | list[str]:
    named = args.boundaries.split(",")
    return str(args.boundaries) if args.boundaries in ("auto", "branches") else named


def _load(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    module_name, colon, factory_name = target.rpartition(":")
    if not colon:
        raise TargetError(f"target {target!r} is not MODULE:FACTORY, such as models.py:tiny_gpt.")
    path = Path(module_name)
    if path.suffix == ".py":
        sys.path.insert(0, str(path.resolve().parent))
        module_name = path.stem
    else:
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise TargetError(
            f"target {target!r} cannot be loaded: {error}. MODULE must be importable from here or "
            "be a path to a .py file, and FACTORY a name in it."
        ) from error
    made = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    model, *inputs = made if isinstance(made, tuple) else (made,)
    if not isinstance(model, nn.Module) or len(inputs) > 2:
        raise TargetError(
            f"target {target!r} gave a {type(made).__name__}; it must return a torch.nn.Module, "
            "(model, args) or (model, args, kwargs)."
        )
    example = (tuple(inputs[0]), dict(inputs[1])) if len(inputs) == 2 else (inputs or [None])[0]
    args, kwargs = inputs_of(model, example)
    return model, args, kwargs


if __name__ == "__main__":
    sys.exit(main())
