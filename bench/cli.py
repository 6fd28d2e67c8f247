"""`python -m fastseq bench [family ...]`: measure, compare with the bars, keep the results."""

import argparse
import importlib.util
import re
import sys
import time
from pathlib import Path

from . import machine

NEEDED = ("torch", "rich", "matplotlib")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; default threads: two, or all cores of a smaller machine."""
    threads = min(2, machine.cores())
    parser = argparse.ArgumentParser(prog="python -m fastseq bench", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="family", help="default: all")
    parser.add_argument("--full", action="store_true", help="all cases, more rounds (long)")
    parser.add_argument("--filter", type=re.compile, metavar="REGEX", help="cases and jobs by name")
    parser.add_argument("--threads", type=int, default=threads, help=f"default: {threads}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results")
    parser.add_argument("--json", type=Path, metavar="PATH", help="the JSON file, if elsewhere")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and end")
    parser.add_argument("--self-test", action="store_true", help="only time ours against itself")
    args = parser.parse_args(argv)
    if not 1 <= args.threads <= machine.cores():
        parser.error(f"--threads must be 1 to {machine.cores()}, got {args.threads}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the suite; 1 if a result of ours was wrong, 2 for bad arguments, else 0."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"fastseq bench needs {', '.join(missing)}: pip install 'fastseq-kernels[bench]'")
        return 2
    args = parse(argv)
    if not args.list:
        machine.limit_threads(args.threads)
    from .families import registry

    families = registry()
    unknown = [name for name in args.families if name not in families]
    if unknown:
        print(f"fastseq bench: no family {unknown[0]!r}; there are {', '.join(families)}")
        return 2
    chosen = [families[name] for name in args.families or families]
    return max([_run_family(family, args) for family in chosen], default=0)


def _run_family(family, args: argparse.Namespace) -> int:
    from .session import Session

    session = Session(family, args.threads, args.full, args.filter, args.out)
    if args.list:
        print(*session.names(), sep="\n")
        return 0
    start = time.perf_counter()
    session.self_test()
    if args.self_test:
        return 0
    wrong = session.run()
    session.keep(args.json, seconds=time.perf_counter() - start)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
