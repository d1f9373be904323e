"""The command line: ``rfcompile explain``, ``diff``, ``residuals``, ``analyze`` on MODULE:FACTORY.

Results go to stdout, everything else to stderr, what the model prints included. Exit codes:

==== ============================================== ========================= ================
code explain                                        diff                      residuals
==== ============================================== ========================= ================
0    every eligible site is quantized               the graph changed         some are found
1    an eligible site stays exact, or there is none the graph did not change  there are none
2    the command line is wrong                      (the same)                (the same)
3    an error, printed to stderr                    (the same)                (the same)
==== ============================================== ========================= ================

``analyze`` has 0, 2 and 3.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from torch import nn

from rfcompile import api
from rfcompile.analyze import analyze
from rfcompile.capture import inputs_of
from rfcompile.errors import RFCompileError, TargetError
from rfcompile.explain import explain
from rfcompile.fingerprint import package_version
from rfcompile.formats import as_format
from rfcompile.policy import Policy
from rfcompile.process_groups import simulated
from rfcompile.report import Report
from rfcompile.residuals import as_json, as_text, find_residuals


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (argparse exits by itself with 2)."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except (RFCompileError, NotImplementedError) as error:
        print(f"rfcompile: {error}", file=sys.stderr)
    except Exception:  # of the user's model: Python's own exit code would be 1
        traceback.print_exc()
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
    residuals = commands.add_parser("residuals", help="where the model adds what it skipped")
    residuals.set_defaults(command=_residuals)
    analysis = commands.add_parser("analyze", help="condition numbers, kurtosis, attention norms")
    analysis.set_defaults(command=_analyze)
    for command in (explain, diff, residuals, analysis):
        command.add_argument(
            "target",
            metavar="MODULE:FACTORY",
            help="a function without arguments that returns a model, (model, args) or "
            "(model, args, kwargs); MODULE is importable or a path to a .py file",
        )
        command.add_argument("--json", action="store_true", help="print JSON")
    for command in (explain, diff):
        command.add_argument(
            "--bits",
            dest="format",
            metavar="FORMAT",
            default="4",
            help='bits, or a format such as "4b:g64:h32" (default: 4)',
        )
        command.add_argument("--min-bytes", type=int, default=0, help="smaller ones stay exact")
        command.add_argument(
            "--policy", type=Path, metavar="FILE", help="a policy in TOML, instead of these two"
        )
        command.add_argument(
            "--world-size",
            type=_positive,
            default=1,
            help="for a model with collectives: simulate this many ranks while FACTORY and the "
            "model run; nothing is sent",
        )
    for command in (explain, diff, analysis):
        command.add_argument(
            "--boundaries", default="auto", help='"auto", "branches", or module paths with commas'
        )
    diff.add_argument("--html", type=Path, metavar="FILE", help="also write a page to FILE")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 or more")
    return int(text)


def _explain(args: argparse.Namespace) -> int:
    with _ranks(args), redirect_stdout(sys.stderr):
        report = _report(args, *_load(args.target))
    print(report.json() if args.json else report.text())
    return 1 if not report.sites or any(site.eligible for site in report.skipped) else 0


def _report(
    args: argparse.Namespace, model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> Report:
    return explain(
        model, *inputs, kwargs=kwargs, policy=_policy(args), boundaries=_boundaries(args)
    )


def _diff(args: argparse.Namespace) -> int:
    with _ranks(args), redirect_stdout(sys.stderr):
        model, inputs, kwargs = _load(args.target)
        report = _report(args, model, inputs, kwargs) if args.world_size > 1 else None
        if report and report.graphs:
            result = api.diff(report)
        else:
            after = api.transform(model, policy=_policy(args), boundaries=_boundaries(args))
            result = api.diff(model, after, example_inputs=(inputs, kwargs))
    print(result.json() if args.json else result.text())
    if args.html:
        args.html.write_text(result.html(), encoding="utf-8")
        print(f"rfcompile: wrote {args.html}", file=sys.stderr)
    return 0 if result.changed else 1


def _residuals(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):
        model, inputs, kwargs = _load(args.target)
        found = find_residuals(model, inputs, kwargs)
    print(as_json(found) if args.json else as_text(found))
    return 0 if found else 1


def _analyze(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):
        model, inputs, kwargs = _load(args.target)
        found = analyze(model, *inputs, kwargs=kwargs, boundaries=_boundaries(args))
    print(found.json() if args.json else found)
    return 0


def _ranks(args: argparse.Namespace) -> AbstractContextManager[None]:
    return simulated(args.world_size) if args.world_size > 1 else nullcontext()


def _policy(args: argparse.Namespace) -> Policy:
    if args.policy is not None:
        return Policy.from_file(args.policy)
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
    except Exception as error:
        raise TargetError(
            f"target {target!r} cannot be loaded: {_describe(error)}. MODULE must be importable "
            "from here or be a path to a .py file, and FACTORY a name in it."
        ) from error
    try:
        made = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    except Exception as error:
        raise TargetError(
            f"target {target!r} cannot be called without arguments: {_describe(error)}."
        ) from error
    match made:
        case nn.Module() as model:
            args, kwargs = inputs_of(model, None)
        case (nn.Module() as model, example):
            args, kwargs = inputs_of(model, example)
        case (nn.Module() as model, (tuple() | list() as positional), Mapping() as named):
            args, kwargs = tuple(positional), dict(named)
        case _:
            made = made if isinstance(made, tuple) else (made,)
            raise TargetError(
                f"target {target!r} gave {', '.join(type(item).__name__ for item in made)}; it "
                "must return a torch.nn.Module, (model, args) or (model, args, kwargs), with a "
                "tuple of args and a dict of kwargs."
            )
    return model, args, kwargs


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
