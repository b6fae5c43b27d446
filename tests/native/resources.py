"""Registers, stack and shared memory of compiled kernels, and the committed tables they are held against."""

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# architecture -> kernel -> {"registers", "stack", "shared"}
Usage = dict[str, dict[str, dict[str, int]]]


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one inside the Triton wheel (minimal toolkits leave it out)."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    packed = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(packed) if packed.exists() else None


def read_usage(binary: Path) -> Usage:
    """What every kernel in a shared library's fat binary takes; a single cubin is listed under "".

    Stack counts spills and local arrays.
    """
    tool = cuobjdump()
    assert tool is not None
    text = subprocess.run(
        [tool, "--dump-resource-usage", str(binary)], check=True, capture_output=True, text=True
    ).stdout
    if names := shutil.which("c++filt"):
        text = subprocess.run([names], input=text, check=True, capture_output=True, text=True).stdout
    usage: Usage = {}
    architecture = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (?:void )?(.+):$", line):
            kernel = match[1]
        elif match := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            usage.setdefault(architecture, {})[kernel] = {
                "registers": registers,
                "stack": stack + local,
                "shared": shared,
            }
    return usage


def write_table(path: Path, compiler: str, usage: Usage) -> None:
    path.write_text(json.dumps({"compiler": compiler, "usage": usage}, indent=2, sort_keys=True) + "\n")


def differences(path: Path, compiler: str, usage: Usage) -> list[str]:
    """What a reader must act on; empty if all is as committed. Another compiler is held to "no stack" alone."""
    found = [
        f"{architecture} {kernel}: {row['stack']} bytes of stack (spills)"
        for architecture, kernels in usage.items()
        for kernel, row in kernels.items()
        if row["stack"]
    ]
    table: dict[str, Any] = json.loads(path.read_text())
    if table["compiler"] != compiler:
        return found
    committed: Usage = table["usage"]
    for architecture in sorted({*usage, *committed}):
        ours, theirs = usage.get(architecture, {}), committed.get(architecture, {})
        found += [
            f"{architecture} {kernel}: {theirs.get(kernel)} in the table, {ours.get(kernel)} now"
            for kernel in sorted({*ours, *theirs})
            if ours.get(kernel) != theirs.get(kernel)
        ]
    return found
