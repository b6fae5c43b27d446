"""A new op: every file that one consists of, working and tested, for its formula to be put in place of the template's.

Writes effkern/ops/NAME (api, schema, reference, triton), csrc/cpu/NAME.cpp, tests/ops/test_NAME.py,
benchmarks/ops/NAME.py and docs/ops/NAME.md; adds NAME to what effkern/__init__.py exports and to the runs of
benchmarks/suite.py. The template computes relu(gate)^2 times up. Nothing is written where something would be
overwritten, or where those two files have changes that are not committed. docs/adding-an-op.md has the steps.
"""

import argparse
import sys
from pathlib import Path

from tests.scaffold.writing import Refusal, scaffold

ROOT = Path(__file__).parents[2]
NEXT = """Next: build (make install), then
  python -m pytest tests/ops/test_{name}.py
  python -m benchmarks {name} --rows 512 --dims 256
and go on with step 3 of docs/adding-an-op.md."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.scaffold", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="of the op: lower case, digits, underscores, e.g. row_softplus")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="the tree; default: this repository")
    a = parser.parse_args(arguments)
    try:
        written = scaffold(a.name, a.root)
    except Refusal as refusal:
        print(f"scaffold: {refusal}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    print(NEXT.format(name=a.name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
