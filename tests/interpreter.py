"""bfloat16 in Triton's interpreter, which multiplies the bits of such numbers and does not round, as on a GPU."""

from typing import Any

import pytest


def exact_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of two bfloat16 numbers are exact in float32; float32 goes to the nearest bfloat16, ties to even."""
    import numpy as np
    from triton.runtime import interpreter

    builder, tl = interpreter.InterpreterBuilder, interpreter.tl
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def widen(x: Any) -> Any:
        if x.data.dtype != np.uint16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return plain_cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16)
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: plain_dot(self, widen(a), widen(b), *rest))
    monkeypatch.setattr(builder, "cast_impl", cast)
