"""python -m benchmarks [op] [options]: one op's benchmark with its own options, or all of them with their defaults.

python -m benchmarks run       the ops' measurements into one file, as JSON lines
python -m benchmarks check     that file against the targets
python -m benchmarks compare   two such files
python -m benchmarks report    that file as one page with pictures
"""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

OPS = sorted(path.stem for path in (Path(__file__).parent / "ops").glob("*.py") if path.stem != "__init__")

COMMANDS = {"run": "suite", "check": "targets", "compare": "compare", "report": "report"}


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nops: {', '.join(OPS)}; python -m benchmarks OP --help shows the options of one")
        return 0
    if arguments and arguments[0] in COMMANDS:
        return import_module(f"benchmarks.{COMMANDS[arguments[0]]}").main(arguments[1:])
    if arguments and arguments[0] not in OPS:
        print(f"benchmarks: op must be one of {', '.join([*COMMANDS, *OPS])}, got {arguments[0]!r}", file=sys.stderr)
        return 2
    if arguments[:1] == ["distill"] and "--explain" in arguments:
        from effkern.cli import main as effkern

        return effkern(["bench", *arguments])
    for op in arguments[:1] or OPS:
        print(f"== {op}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.ops.{op}", *arguments[1:]], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
