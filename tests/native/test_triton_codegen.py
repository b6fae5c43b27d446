"""Triton kernels compile to machine code for three architectures without a GPU, and take what the table says."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.native import resources, triton_codegen

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(resources.cuobjdump() is None, reason="cuobjdump not found"),
]


def run(*arguments: str) -> dict[str, Any]:
    """In a process of its own: under TRITON_INTERPRET=1 this one has no compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(triton_codegen.ROOT / "build" / "triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.native.triton_codegen", *arguments],
        cwd=triton_codegen.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return run()


def test_every_op_is_compiled_for_every_architecture(measured):
    assert set(measured["usage"]) == {f"sm_{capability}" for capability in triton_codegen.CAPABILITIES}
    ops = {path.parent.name for path in (triton_codegen.ROOT / "effkern" / "ops").glob("*/triton.py")}
    for cases in measured["usage"].values():
        assert {name.split("/")[0] for name in cases} == ops | {"sample"}


def test_resources_are_as_committed(measured):
    found = resources.differences(triton_codegen.TABLE, measured["compiler"], measured["usage"])
    assert not found, "\n".join([*found, "meant? python -m tests.native.triton_codegen --write"])


def test_spills_are_seen():
    """The control: a kernel that cannot fit its registers."""
    usage = run("--spill")
    found = resources.differences(triton_codegen.TABLE, "another compiler", usage)
    assert len(found) == 1
    assert "bytes of stack (spills)" in found[0]
