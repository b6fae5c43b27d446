"""python -m benchmarks COMMAND, or python -m benchmarks OP [options]; `effkern bench` is the same.

run         every op's measurements into one file, as JSON lines: --op, --device, --quick, --full, --json
check       that file against the targets (targets.toml)
compare     two such files
report      that file as one page with pictures
baseline    ratios to the floors against those that are committed
scaling     cost against size, and calls of more than 2^31 elements
ceilings    what this machine copies and multiplies at best
peers       every op beside other packages, in one run
end_to_end  the trainer, method by method, beside plain torch
import_time what `import effkern` costs beside `import torch`
records     committed results of other commands as result lines

OP          one op's benchmark with its own options; --explain says what a case needs and what the op chooses; exit
            status 77 if it cannot run here
            without one: all of them, with their defaults; a failed one does not stop the others
"""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

OPS = sorted(path.stem for path in (Path(__file__).parent / "ops").glob("*.py") if path.stem != "__init__")

COMMANDS = {
    "run": "suite", "check": "targets", "compare": "compare", "report": "report", "baseline": "baseline",
    "scaling": "scaling", "ceilings": "ceilings", "peers": "peers.__main__", "end_to_end": "end_to_end",
    "import_time": "import_time", "records": "records",
}  # fmt: skip


def explain(arguments: list[str]) -> int:
    """--explain without an op is that of all; the loss without a case has its cost model, as everywhere."""
    if arguments[0] == "distill":
        from effkern.cli import main as effkern

        return effkern(["bench", *arguments])
    from benchmarks.suite import SMALL

    for op in SMALL:
        if done := subprocess.run([sys.executable, "-m", f"benchmarks.ops.{op}", *arguments], check=False).returncode:
            return done
    return 0


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nops: {', '.join(OPS)}; python -m benchmarks OP --help shows the options of one")
        return 0
    if arguments and arguments[0] in COMMANDS:
        return import_module(f"benchmarks.{COMMANDS[arguments[0]]}").main(arguments[1:])
    if arguments[:1] == ["--explain"] or (arguments[:1] == ["distill"] and "--explain" in arguments):
        return explain(arguments)
    if arguments and arguments[0] not in OPS:
        print(f"benchmarks: op must be one of {', '.join([*COMMANDS, *OPS])}, got {arguments[0]!r}", file=sys.stderr)
        return 2
    statuses = {}
    for op in arguments[:1] or OPS:
        print(f"== {op}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.ops.{op}", *arguments[1:]], check=False)
        statuses[op] = done.returncode
    if arguments:
        return statuses[arguments[0]]
    # Those that cannot run here have said so.
    failed = [op for op, status in statuses.items() if status not in (0, 77)]
    if failed:
        print(f"benchmarks: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (| head); what Python still holds must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)
