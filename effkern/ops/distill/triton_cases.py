"""What `tests.native.triton_codegen` compiles without a GPU: launches of `triton_rows`, by name."""

from typing import Any

from effkern.ops.distill.rows import DIVERGENCES
from effkern.ops.distill.triton_dense import distill_dense_kernel
from effkern.ops.distill.triton_launch import DENSE_LAUNCH, SPARSE_LAUNCH, kept_blocks, launch_of, needs_middle_pass
from effkern.ops.distill.triton_scale import BLOCK, NUM_WARPS, scale_grad_kernel
from effkern.ops.distill.triton_sparse import distill_sparse_kernel

_LARGE = 128 << 10
_EVERYTHING = {"TEMPERED": True, "HAS_BIAS": True, "HAS_CAP": True}


def _case(kernel: Any, table: list, vocab: int, special: dict[str, Any], grad: str = "*bf16", **flags: bool) -> tuple:
    launch = launch_of(table, vocab)
    constants = {
        "TEMPERED": False, "HAS_BIAS": False, "HAS_CAP": False, "WANT_GRAD": True, **flags, **special,
        "RESIDENT": vocab <= launch.block, "BLOCK": launch.block,
    }  # fmt: skip
    types = {"labels_ptr": "*i64", "ids_ptr": "*i64", "grad_ptr": grad, "num_kept": "i32", "ignore_index": "i32"}

    def type_of(name: str) -> str:
        if name in types:
            return types[name]
        if name.endswith("_ptr"):
            return "*fp32"
        return "i32:16" if name == "vocab" or name.endswith("_stride") else "fp32"

    signature = {name: type_of(name) for name in kernel.arg_names if name not in constants}
    return kernel, signature, constants, {"num_warps": launch.warps, "maxnreg": launch.registers}


def _dense(divergence: str, vocab: int = _LARGE, logprobs: bool = False, **more: Any) -> tuple:
    special = {"DIVERGENCE": divergence, "MIDDLE": needs_middle_pass(divergence), "LOGPROBS": logprobs}
    return _case(distill_dense_kernel, DENSE_LAUNCH, vocab, special, **more)


def _sparse(kind: str, vocab: int = _LARGE, num_kept: int = 64, reverse: bool = False, **more: Any) -> tuple:
    special = {"KIND": kind, "REVERSE": reverse, **kept_blocks(num_kept)}
    return _case(distill_sparse_kernel, SPARSE_LAUNCH, vocab, special, **more)


COMPILE_CASES = {
    **{f"dense_{name}_bf16": _dense(name) for name in DIVERGENCES},
    **{f"dense_{name}_all": _dense(name, **_EVERYTHING) for name in ("forward_kl", "symmetric_kl", "jsd")},
    **{f"dense_{name}_{size}": _dense(name, size, **_EVERYTHING)
       for name in ("jsd", "symmetric_kl", "decoupled_kl") for size in (1024, 2048, 4096)},
    "dense_cosine_4096": _dense("cosine", 4096),
    "dense_forward_kl_fp32": _dense("forward_kl", grad="*fp32"),
    "dense_forward_kl_eval": _dense("forward_kl", grad="*fp32", WANT_GRAD=False),
    "dense_forward_kl_logprobs": _dense("forward_kl", logprobs=True),
    "hard_bf16": _sparse("none", num_kept=1),
    "hard_eval": _sparse("none", num_kept=1, grad="*fp32", WANT_GRAD=False),
    **{f"sparse_{kind}_bf16": _sparse(kind) for kind in ("truncated", "both_renormalized", "tail_bucket",
                                                         "tail_to_label", "uniform_tail")},
    "sparse_tail_bucket_reverse": _sparse("tail_bucket", reverse=True),
    "sparse_uniform_tail_512_all": _sparse("uniform_tail", num_kept=512, **_EVERYTHING),
    "sparse_both_renormalized_512_all": _sparse("both_renormalized", num_kept=512, **_EVERYTHING),
    **{f"sparse_uniform_tail_{size}": _sparse("uniform_tail", size, **_EVERYTHING) for size in (1024, 4096, 8192)},
    **{f"sparse_tail_bucket_{size}": _sparse("tail_bucket", size, **_EVERYTHING) for size in (4096, 8192)},
    "sparse_tail_bucket_fp32": _sparse("tail_bucket", grad="*fp32"),
    **{f"scale_grad_{size}": (scale_grad_kernel, {"grad_ptr": "*bf16", "factor_ptr": "*fp32", "size": size},
                              {"BLOCK": BLOCK}, NUM_WARPS) for size in ("i32", "i64")},
}  # fmt: skip
