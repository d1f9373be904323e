"""What do the companion methods give and cost? Each study here answers with a table.

    taskset -c 0 python benchmarks/companions.py attention --seeds 3
    taskset -c 0 python benchmarks/companions.py low_rank --help      # options of its own
    taskset -c 0 python benchmarks/companions.py adapters --help

Results go to ``results/companions_<study>.jsonl``; what they say is in ``companions.md``. The
study "attention" goes on where a run was cut short: its module has ``rows(options)``, which yields
results as plain dicts (and skips those whose ``key`` is in ``options.done``), ``table(rows)`` and
``plot(rows, path)``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from common import RESULTS, machine

STUDIES = {"attention": "companions_attention"}
"""Name: module."""
SCRIPTS = {"low_rank": "companions_low_rank", "adapters": "companions_adapters"}
"""Those with a ``main`` of their own."""


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in SCRIPTS:
        name = SCRIPTS[sys.argv.pop(1)]
        return importlib.import_module(name).main()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=[*STUDIES, *SCRIPTS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a dry run: seconds, no results")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the study")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    study = importlib.import_module(STUDIES[options.study])
    out = options.out or RESULTS / f"{STUDIES[options.study]}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    options.done = {row["key"] for row in rows}
    for row in study.rows(options):
        rows.append(row | machine())
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(row["key"], flush=True)
    print(study.table(rows))
    study.plot(rows, out.with_suffix(".png"))
    print(f"written: {out} and its .png")


if __name__ == "__main__":
    main()
