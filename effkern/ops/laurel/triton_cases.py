"""What `tests.native.triton_codegen` compiles without a GPU: launches of triton.py, by name."""

from typing import Any

from effkern.ops.laurel.triton_backward import laurel_bwd_kernel
from effkern.ops.laurel.triton_forward import laurel_fwd_kernel
from effkern.ops.laurel.triton_launch import ONE_KERNEL, launch_of, padded
from effkern.ops.laurel.triton_scalars import laurel_scalar_grads_kernel

# float32 whatever the type of x is; every other pointer has that type.
_WIDE = ("weights_ptr", "coefficients_ptr", "rstd_ptr", "grad_raw_ptr", "sums_ptr", "norm_sums_ptr", "factor_ptr")
_SIZES = ("num_rows", "dim", "num_down", "num_up", "num_past", "num_programs", "down_row", "up_row")
# A stride of 1 is compiled in.
_ROW_MAJOR = {"down_column": 1, "up_column": 1}


def _signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    def type_of(name: str) -> str:
        if name.endswith("_ptr"):
            return "*fp32" if name in _WIDE else f"*{dtype}"
        if name in _SIZES or name.endswith("_stride"):
            return "i32" if name in ("num_rows", "num_programs") else "i32:16"
        return "fp32"

    return {name: type_of(name) for name in kernel.arg_names if name not in constants}


def _case(
    kernel: Any, direction: str, own: int, past: int = 0, ahead: int = 0, dtype: str = "bf16", **flags: Any
) -> tuple:
    """A low-rank map of `own` columns, beside `past` columns of earlier layers and `ahead` for later ones."""
    backward = kernel is laurel_bwd_kernel
    inner, down = flags.get("INNER", False), padded(own + ahead)
    split = down > ONE_KERNEL or (backward and inner)
    constants = {
        "MAP": "softmax2", "PER_CHANNEL": False, "DOWN": 0 if split else down, "UP": padded(own + past),
        "HAS_OWN": own > 0, "HAS_PAST": past > 0, "INNER": False, "ADDENDS": 0, "COEFFICIENTS": 0, "NORM": True,
        **_ROW_MAJOR, **flags,
    }  # fmt: skip
    if backward:
        weights, by_column = constants["MAP"] != "unit", constants["PER_CHANNEL"] or constants["COEFFICIENTS"] == 2
        slots = 2 + constants["ADDENDS"] if weights or constants["COEFFICIENTS"] else 0
        constants = {
            "HAS_GRAD_Y": True, "SLOTS": slots, "BY_COLUMN": by_column, "OF_WEIGHTS": weights,
            "OF_LOW_RANK": weights and own + past > 0 and not by_column and not inner, "STORE_G": False,
            "HAS_GRAD_OWN": ahead > 0, "SPLIT": split, **constants,
        }  # fmt: skip
    launch = launch_of(direction, dtype == "fp32", max(constants["DOWN"], constants["UP"]))
    constants |= {"ROWS": launch.rows, "BLOCK": launch.block}
    return (
        kernel, _signature(kernel, constants, dtype), constants,
        {"num_warps": launch.warps, "num_stages": launch.stages},
    )  # fmt: skip


def _both(name: str, *columns: Any, **flags: Any) -> dict[str, tuple]:
    return {
        f"fwd_{name}": _case(laurel_fwd_kernel, "forward", *columns, **flags),
        f"bwd_{name}": _case(laurel_bwd_kernel, "backward", *columns, **flags),
    }


def _finish(name: str, addends: int) -> tuple:
    constants = {"MAP": name, "ADDENDS": addends, "COEFFICIENTS": int(addends > 0), "KEPT_BRANCH": False,
                 "OVER_ALPHA": True, "WIDTH": 2 if addends == 0 else 8, "BLOCK": 128}  # fmt: skip
    return laurel_scalar_grads_kernel, _signature(laurel_scalar_grads_kernel, constants, "fp32"), constants, 4


_CHANNEL: dict[str, Any] = {"PER_CHANNEL": True, "ADDENDS": 4, "COEFFICIENTS": 2}
_GEMMA: dict[str, Any] = {"MAP": "unit", "INNER": True, "ADDENDS": 1}

# Numbers in the names: columns of A used here, and sent by earlier layers.
COMPILE_CASES = {
    **_both("plain", 0, MAP="unit"),
    **_both("weights", 0),
    **_both("channel_addends", 0, **_CHANNEL),
    **{key: case for r in (16, 32, 64, 128) for key, case in _both(f"{r}", r).items()},
    **_both("64_no_norm", 64, NORM=False),
    **_both("64_gemma", 64, **_GEMMA),
    **_both("64_channel_addends", 64, **_CHANNEL),
    **_both("32_past_64", 32, 64, 64),
    **_both("64_past_128", 64, 128, 128),
    **_both("64_fp32", 64, dtype="fp32"),
    **_both("128_fp32", 128, dtype="fp32"),
    **_both("64_past_128_fp32", 64, 128, 128, dtype="fp32"),
    "decode_weights": _case(laurel_fwd_kernel, "decode", 0),
    "decode_64": _case(laurel_fwd_kernel, "decode", 64),
    "decode_64_gemma": _case(laurel_fwd_kernel, "decode", 64, **_GEMMA),
    "decode_64_past_128": _case(laurel_fwd_kernel, "decode", 64, 128, 128),
    "decode_64_fp32": _case(laurel_fwd_kernel, "decode", 64, dtype="fp32"),
    "scalars_softmax2": _finish("softmax2", 0),
    "scalars_sigmoid": _finish("sigmoid", 4),
}
