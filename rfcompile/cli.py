"""The command line ``rfcompile``: explain, diff, plan, residuals, analyze, kernels on
MODULE:FACTORY.

Results go to stdout, everything else to stderr, what the model prints included. Exit codes:

==== ============================================== ========================= ================
code explain                                        diff                      residuals
==== ============================================== ========================= ================
0    every eligible site is quantized               the graph changed         some are found
1    an eligible site stays exact, or there is none the graph did not change  there are none
2    the command line is wrong                      (the same)                (the same)
3    an error, printed to stderr                    (the same)                (the same)
==== ============================================== ========================= ================

``plan``, ``analyze`` and ``kernels`` have 0, 2 and 3.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from rfcompile import api
from rfcompile.analyze import analyze
from rfcompile.codec.fingerprint import package_version
from rfcompile.codec.formats import as_format
from rfcompile.emission.compare import compare, read_report
from rfcompile.emission.gpus import GPUS
from rfcompile.errors import OptionError, RFCompileError, TargetError
from rfcompile.explain import explain
from rfcompile.graph.capture import inputs_of
from rfcompile.planning.link import Link
from rfcompile.planning.plan import plan
from rfcompile.planning.score import FORMATS, score
from rfcompile.report.report import Report
from rfcompile.rewrites.residual.find import as_json, as_text, find_residuals
from rfcompile.rewrites.wires import Wire
from rfcompile.wire.default_policy import bits_of_text, default_policy
from rfcompile.wire.policy import as_policy
from rfcompile.wire.process_groups import simulated

RETURNED = "a model, (model, args) or (model, args, kwargs)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (argparse exits by itself with 2)."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except (RFCompileError, NotImplementedError) as error:
        print(f"rfcompile: {error}", file=sys.stderr)
    except (Exception, SystemExit):  # of the user's model: its exit code would read as ours
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
    planning = commands.add_parser("plan", help="which bits where, under a budget")
    planning.set_defaults(command=_plan)
    analysis = commands.add_parser("analyze", help="condition numbers, kurtosis, attention norms")
    analysis.set_defaults(command=_analyze)
    gpu = commands.add_parser("kernels", help="the GPU kernels, generated without the GPU")
    gpu.set_defaults(command=_kernels)
    for command in (explain, diff, planning, residuals, analysis, gpu):
        returned = "(model, batches, loss)" if command is planning else RETURNED
        command.add_argument(
            "target",
            type=_target,
            metavar="MODULE:FACTORY",
            help=f"a function without arguments that returns {returned}; MODULE is importable or a "
            "path to a .py file",
        )
        command.add_argument("--json", action="store_true", help="print JSON")
    for command in (explain, diff, gpu):
        formats = command.add_mutually_exclusive_group()
        formats.add_argument(
            "--bits",
            dest="policy_of_bits",
            metavar="FORMAT",
            type=_checked(lambda text: as_policy(bits_of_text(text))),
            help='bits, or a format such as "4b:g64:h32" (default: the default policy, else 4)',
        )
        formats.add_argument(
            "--policy",
            type=_checked(lambda text: as_policy(Path(text))),
            metavar="FILE",
            help="a policy in TOML, instead of --bits",
        )
        command.add_argument(
            "--min-bytes",
            type=_whole,
            metavar="N",
            help="smaller ones stay exact (default: the policy's, else 16384 with collectives and "
            "0 for a fake wire)",
        )
        command.add_argument(
            "--world-size",
            type=_positive,
            default=1,
            help="for a model with collectives: simulate this many ranks while FACTORY and the "
            "model run; nothing is sent",
        )
    for command in (explain, diff, planning, analysis, gpu):
        command.add_argument(
            "--modules",
            default="auto",
            help='the blocks: "auto", "blocks", "branches", or module paths with commas',
        )
    for command in (explain, diff, planning):
        command.add_argument(
            "--html", type=_new_file, metavar="FILE", help="also write a page to FILE"
        )
    _add_gpu_options(gpu)
    _add_plan_options(planning)
    return parser


def _add_plan_options(command: argparse.ArgumentParser) -> None:
    budget = command.add_mutually_exclusive_group(required=True)
    for name, unit in (("bytes", "bytes a batch"), ("seconds", "seconds a batch"), ("loss", "")):
        unit = unit or "predicted increase of the loss"
        budget.add_argument(f"--{name}", type=float, metavar="N", help=f"the budget: {unit}")
    command.add_argument(
        "--formats",
        default=FORMATS,
        type=_checked(lambda text: [as_format(bits_of_text(word)) for word in text.split(",")]),
        metavar="LIST",
        help='the candidates, such as 2,3,4,"4b:h128" (default: 2 to 8 bits in groups of 128)',
    )
    command.add_argument(
        "--link",
        type=_checked(_link),
        metavar="BANDWIDTH,LATENCY",
        help="bytes a second and seconds of the link that the outputs are sent over",
    )
    command.add_argument(
        "--save", type=_new_file, metavar="FILE", help="write the plan as a policy in TOML"
    )


def _link(text: str) -> Link:
    bandwidth, _, latency = text.partition(",")
    return Link(_number(bandwidth), _number(latency or "0"))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OptionError("link", text, "give numbers, as in 125e6,1e-4.") from None


def _add_gpu_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--target",
        dest="gpu",
        choices=[*GPUS],
        default="sm_90",
        help=", ".join(f"{gpu.target}: {gpu.name}" for gpu in GPUS.values()) + " (default: sm_90)",
    )
    command.add_argument(
        "--every-config",
        action="store_true",
        help="compile every configuration that Inductor would try, and report the one that the "
        "model of time takes for the fastest (default: the widest)",
    )
    command.add_argument(
        "--source", type=Path, metavar="DIR", help="write the Triton and the machine code to DIR"
    )
    command.add_argument(
        "--diff",
        type=_checked(lambda text: read_report(Path(text))),
        metavar="FILE",
        help="print what differs from a report that --json printed before",
    )


def _target(text: str) -> str:
    module, _, factory = text.rpartition(":")
    if not (module and factory):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODULE:FACTORY, as models.py:tiny_gpt")
    if module.endswith(".py") and not Path(module).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {module}")
    return text


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a file in a folder that exists")
    return path


def _positive(text: str) -> int:
    if not _is_number(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 or more")
    return int(text)


def _whole(text: str) -> int:
    if not _is_number(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or more")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def _checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader for argparse."""

    def given(text: str) -> Any:
        try:
            return read(text)
        except (RFCompileError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return given


def _explain(args: argparse.Namespace) -> int:
    with _ranks(args), redirect_stdout(sys.stderr):
        report = _report(args, *_load(args.target))
    print(report.json() if args.json else report.text())
    _write_page(args.html, report.page)
    return 1 if not report.sites or any(site.eligible for site in report.skipped) else 0


def _report(
    args: argparse.Namespace, model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> Report:
    return explain(model, _wire(args), example_inputs=(inputs, kwargs))


def _diff(args: argparse.Namespace) -> int:
    with _ranks(args), redirect_stdout(sys.stderr):
        model, inputs, kwargs = _load(args.target)
        report = _report(args, model, inputs, kwargs) if args.world_size > 1 else None
        if report and report.graphs:
            result = api.diff(report)
        else:
            after = api.transform(model, _wire(args))
            result = api.diff(model, after, example_inputs=(inputs, kwargs))
    print(result.json() if args.json else result.text())
    _write_page(args.html, result.page)
    return 0 if result.changed else 1


def _plan(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):
        match _made(args.target):
            case (nn.Module() as model, batches, loss) if callable(loss):
                pass
            case other:
                raise TargetError(
                    f"target {args.target!r} gave {_types(other)}; for a plan it must return "
                    "(model, batches, loss), with a function of (model, batch) that returns one "
                    "number as loss."
                )
        scores = score(model, batches, loss=loss, formats=args.formats, modules=_modules(args))
        budget = {"bytes": args.bytes, "seconds": args.seconds, "loss": args.loss}
        result = plan(scores, **budget, link=args.link)
    print(result.json() if args.json else result.text())
    if args.save:
        result.save(args.save)
        print(f"rfcompile: wrote {args.save}", file=sys.stderr)
    _write_page(args.html, lambda path: result.page(path, scores=scores, model=model))
    return 0


def _write_page(path: Path | None, write: Callable[[Path], None]) -> None:
    if path is not None:
        write(path)
        print(f"rfcompile: wrote {path}", file=sys.stderr)


def _residuals(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):
        model, inputs, kwargs = _load(args.target)
        found = find_residuals(model, example_inputs=(inputs, kwargs))
    print(as_json(found) if args.json else as_text(found))
    return 0 if found else 1


def _analyze(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):
        model, inputs, kwargs = _load(args.target)
        found = analyze(model, modules=_modules(args), example_inputs=(inputs, kwargs))
    print(found.json() if args.json else found)
    return 0


def _kernels(args: argparse.Namespace) -> int:
    from rfcompile.kernels import kernels, log  # it loads Inductor, which takes a second

    progress = logging.StreamHandler(sys.stderr)
    progress.setFormatter(logging.Formatter("rfcompile: %(message)s"))
    log.addHandler(progress)
    log.setLevel(logging.INFO)
    try:
        with _ranks(args), redirect_stdout(sys.stderr):
            model, inputs, kwargs = _load(args.target)
            report = kernels(
                model,
                _wire(args),
                example_inputs=(inputs, kwargs),
                target=args.gpu,
                every_config=args.every_config,
            )
    finally:
        log.removeHandler(progress)
    if args.source:
        written = report.write_sources(args.source)
        print(f"rfcompile: wrote {len(written)} files to {args.source}", file=sys.stderr)
    result = compare(args.diff, report.to_dict()) if args.diff else report
    print(result.json() if args.json else result.text())
    return 0


def _ranks(args: argparse.Namespace) -> AbstractContextManager[None]:
    return simulated(args.world_size) if args.world_size > 1 else nullcontext()


def _wire(args: argparse.Namespace) -> Wire:
    policy = args.policy or args.policy_of_bits or default_policy() or as_policy(4)
    if args.min_bytes is not None:
        policy = replace(policy, min_bytes=args.min_bytes)
    return Wire(policy, modules=_modules(args))


def _modules(args: argparse.Namespace) -> str | list[str]:
    named = str(args.modules).split(",")
    return named[0] if len(named) == 1 else named


def _made(target: str) -> Any:
    """What the factory of a target returns."""
    module_name, _, factory_name = target.rpartition(":")
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
        return factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    except Exception as error:
        raise TargetError(
            f"target {target!r} cannot be called without arguments: {_describe(error)}."
        ) from error


def _load(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    match made := _made(target):
        case nn.Module() as model:
            args, kwargs = inputs_of(model, None)
        case (nn.Module() as model, example):
            args, kwargs = inputs_of(model, example)
        case (nn.Module() as model, (tuple() | list() as positional), Mapping() as named):
            args, kwargs = tuple(positional), dict(named)
        case _:
            raise TargetError(
                f"target {target!r} gave {_types(made)}; it must return a torch.nn.Module, (model, "
                "args) or (model, args, kwargs), with a tuple of args and a dict of kwargs."
            )
    return model, args, kwargs


def _types(made: Any) -> str:
    return ", ".join(type(item).__name__ for item in (made if isinstance(made, tuple) else (made,)))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
