"""Numbers of a LoRA-RITE step that are the same for all factors."""

from typing import NamedTuple

from effkern.ops.lora_rite.reference import RiteOptions

EQUILIBRATED = 1e-5
"""Least square of a Cholesky pivot, as a share of its diagonal element, that a float32 Gram matrix is trusted with."""


class Terms(NamedTuple):
    """RiteOptions as the kernels take them."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float
    skip_rms: float
    tolerance: float
    relative_eps: bool
    escaped_mass: bool
    sum_second: bool


def terms_of(options: RiteOptions) -> Terms:
    return Terms(
        float(options.betas[0]),
        float(options.betas[1]),
        float(options.eps),
        float(options.weight_decay),
        float(options.clip_grad),
        float(options.skip_rms),
        float(options.rank_tolerance),
        bool(options.relative_eps),
        bool(options.escaped_mass),
        options.second_moment == "sum",
    )
