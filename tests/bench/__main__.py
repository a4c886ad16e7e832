"""`python -m tests.bench`: measure a real Milepost beside its floors; prints a table, writes JSON."""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from tests.bench import costs, measures
from tests.bench.bench import Bench, Figure, Figures
from tests.bench.peers import peers
from tests.support.load import open_files

MEASURES: dict[str, Callable[[Bench], Figures]] = {
    "callbacks": measures.callbacks,
    "screen": measures.screen,
    "one-job": measures.one_job,
    "watchers": measures.watchers,
    "sustained": measures.sustained,
    "killed": measures.killed,
    "restart": measures.restart,
    "opening": costs.opening,
    "costs": costs.costs,
    "workers": costs.workers,
    "growth": costs.grown,
    "prune": costs.pruning,
    "peers": peers,
}
HOLDS = {">=": float.__ge__, "<=": float.__le__, "<": float.__lt__, "=": float.__eq__}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument("--scale", type=float, default=1.0, help="1 is 10,000 watchers; 0.1 takes minutes")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=".bench.json", help="where they are written"
    )
    parser.add_argument(
        "--peers", type=Path, metavar="FOLDER", help="an installed healthchecks to compare with"
    )
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(MEASURES):
        parser.error(f"no measure is called {', '.join(sorted(unknown))}")
    if "peers" in chosen.names and not chosen.peers:
        parser.error("the measure peers needs --peers")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        bench = Bench(chosen.scale, Path(folder), chosen.peers and chosen.peers.resolve())
        if open_files() < bench.watchers + 500:
            sys.exit(f"{bench.watchers} watchers need a limit of open files above that: ulimit -Hn")
        figures = list(_print(run for name in chosen.names or MEASURES for run in MEASURES[name](bench)))
    said = {"scale": chosen.scale, "machine": _machine(), "figures": [asdict(f) for f in figures]}
    chosen.json.write_text(json.dumps(said, indent=1) + "\n")


def _print(figures: Iterator[Figure]) -> Iterator[Figure]:
    measure = ""
    for figure in figures:
        if figure.measure != measure:
            measure = figure.measure
            print(f"\n{measure}")
        value = f"{figure.value:,.0f}" if abs(figure.value) >= 100 else f"{figure.value:,.3g}"
        print(f"  {figure.name:44} {value:>10} {figure.unit:12} {_verdict(figure)}", flush=True)
        yield figure


def _verdict(figure: Figure) -> str:
    if not figure.goal:
        return ""
    sign, bound = figure.goal.split()
    return f"goal {figure.goal}: {'met' if HOLDS[sign](float(figure.value), float(bound)) else 'MISSED'}"


def _machine() -> dict[str, object]:
    return {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()}


main()
