"""Compiles the Triton kernels of every op to machine code for three architectures, without a GPU.

Each effkern/ops/<op>/triton.py lists what to compile:

    COMPILE_CASES = {"fwd_bf16": (kernel, {"x_ptr": "*bf16", "stride": "i32:16"}, {"BLOCK": 1024}, num_warps)}

name -> (kernel, signature of the run-time arguments, constexpr arguments, number of warps or a dict of compile
options). Pointers are taken as 16-byte aligned, as torch allocates them; ":16" says that an integer is a multiple
of 16. Both are how the launcher specialises.

python -m tests.native.triton_codegen            print registers, stack (spills) and shared memory as JSON
python -m tests.native.triton_codegen --write    the same into triton_resources.json: commit it with the reason

TRITON_INTERPRET must not be set: it replaces the compiler.
"""

import importlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).parent / "triton_resources.json"
CAPABILITIES = (80, 90, 100)

Case = tuple[Any, dict[str, str], dict[str, Any], int | dict[str, Any]]


def cases_of_ops() -> dict[str, Case]:
    """Cases of all ops as <op>/<case>; a triton.py without cases is an error."""
    found: dict[str, Case] = {}
    for path in sorted((ROOT / "effkern" / "ops").glob("*/triton.py")):
        op = path.parent.name
        cases = importlib.import_module(f"effkern.ops.{op}.triton").COMPILE_CASES
        assert cases, f"{path}: COMPILE_CASES is empty"
        found |= {f"{op}/{name}": case for name, case in cases.items()}
    return found


def measure(case: Case, capability: int, folder: Path) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.native.resources import read_usage

    kernel, signature, constexprs, options = case
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or kind.endswith(":16")
    }
    types = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    # The compiler reads the signature in the order of the arguments.
    ordered = {name: "constexpr" if name in constexprs else types[name] for name in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=ordered, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": options} if isinstance(options, int) else options,
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    (row,) = read_usage(cubin)[""].values()
    # Triton's shared memory is dynamic: the compiler knows it, the cubin does not.
    return {**row, "shared": compiled.metadata.shared}


@cache
def all_cases() -> dict[str, Case]:
    """Those of all ops, and the sample."""
    from tests.native import triton_sample

    return cases_of_ops() | {f"sample/{name}": case for name, case in triton_sample.COMPILE_CASES.items()}


def measure_named(where: tuple[str, int]) -> dict[str, int]:
    """A case of `all_cases` by name, for one capability: what another process can be asked for."""
    with TemporaryDirectory() as folder:
        return measure(all_cases()[where[0]], where[1], Path(folder))


def measure_all() -> dict[str, dict[str, dict[str, int]]]:
    """Every case for every architecture, in as many processes as there are cores."""
    places = [(name, capability) for capability in CAPABILITIES for name in all_cases()]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = dict(zip(places, pool.map(measure_named, places, chunksize=4)))
    return {f"sm_{c}": {name: found[name, c] for name in all_cases()} for c in CAPABILITIES}


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "TRITON_INTERPRET is set: there is no compiler"
    # Triton 3.10 turns fused multiply-add off; the table is about the kernels, not about that default.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton

    from tests.native import triton_sample
    from tests.native.resources import write_table

    if sys.argv[1:] == ["--spill"]:
        with TemporaryDirectory() as folder:
            rows = {name: measure(case, 80, Path(folder)) for name, case in triton_sample.SPILLING_CASES.items()}
        print(json.dumps({"sm_80": rows}))
        return
    usage = measure_all()
    if sys.argv[1:] == ["--write"]:
        write_table(TABLE, f"triton {triton.__version__}", usage)
    else:
        print(json.dumps({"compiler": f"triton {triton.__version__}", "usage": usage}))


if __name__ == "__main__":
    main()
