#!/usr/bin/env python
"""Compare runs: how they came out, what differed between them, their curves in one chart.

python tools/compare.py runs/voc2007_cpu runs/voc2007_cpu_cutmix
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from detmix.evaluation.run_plots import plot_runs
from detmix.training.console import run_tool
from detmix.training.run_comparison import compare_runs
from detmix.training.runs import read_runs


def main(args: Sequence[str]) -> None:
    """Print a table of the runs and draw their curves; write the numbers where asked to."""
    parsed = _parser().parse_args(args)
    runs = read_runs(parsed.runs)
    comparison = compare_runs(runs)
    print(comparison)
    if parsed.json is not None:
        parsed.json.parent.mkdir(parents=True, exist_ok=True)
        parsed.json.write_text(json.dumps(comparison.as_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"\nwrote {parsed.json}")
    print(f"\nwrote {plot_runs({run.name: run.metrics for run in runs}, parsed.out)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare runs of tools/train.py, or of tools/pretrain.py: how they came out, "
        "which options and versions differed, and their curves."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.png"), help="the chart, compare.png by default"
    )
    parser.add_argument("--json", type=Path, help="write the tables as JSON to this file")
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(main))
