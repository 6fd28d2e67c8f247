"""`python -m fastseq info [--json]` and `python -m fastseq bench [family ...] [options]`."""

from __future__ import annotations

import sys

USAGE = """usage: python -m fastseq info [--json]
       python -m fastseq bench [family ...] [options]     (bench --help lists them)
"""


def main(argv: list[str]) -> int:
    """Run one command; the exit status."""
    match argv:
        case ["info"] | ["info", "--json"]:
            from fastseq.info import show_config

            show_config(as_json="--json" in argv)
            return 0
        case ["bench", *rest]:
            from fastseq.bench import cli

            return cli.main(rest)
        case ["-h"] | ["--help"]:
            sys.stdout.write(USAGE)
            return 0
    sys.stderr.write(USAGE)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
