"""The command `effkern estimate`."""

from collections.abc import Sequence

from effkern.train.estimate_ranks import NETWORK


def estimate(
    preset: str = "",
    config: str = "",
    gpus: int = 1,
    gpu: str = "h100",
    mode: str = "",
    per_node: int = 8,
    link: float = 0.0,
    network: float = NETWORK,
    precision: str = "bf16",
    set: Sequence[str] = (),
) -> int:
    """Memory of a GPU, communication and time of a step on several of them, before anything runs.

    Args:
        preset: any of effkern train.
        config: TOML file as for effkern train.
        gpus: how many; must divide data.batch_size.
        gpu: h100, h200, a100, a100-40 or b200.
        mode: in place of distributed.mode: ddp, fsdp or hsdp.
        per_node: GPUs that the fast link joins.
        link: GB/s of one GPU and direction inside of a node; 0: the GPU's own.
        network: the same between nodes.
        precision: bf16 or fp32.
        set: other settings as section.field=VALUE (TOML values), such as distributed.replicas=4.
    """
    import torch

    from effkern.train.config import TrainConfig
    from effkern.train.estimate_ranks import Cluster, estimate_ranks, render_ranks
    from effkern.train.mapping import overlay, parse_settings, read_toml
    from effkern.train.presets import PRESETS, get_preset

    table = read_toml(config) if config else {}
    name = preset or table.pop("preset", "")
    table.pop("preset", None)
    chosen = get_preset(name) if name else None
    base = overlay(chosen.config if chosen else TrainConfig(), table, source=config or "config")
    if mode:
        base = overlay(base, {"distributed": {"mode": mode}}, source="--mode")
    base = overlay(base, parse_settings(set), source="--set")
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if precision not in dtypes:
        raise ValueError(f"--precision must be bf16 or fp32, got {precision!r}")
    cluster = Cluster.of(gpus, gpu, per_node, link, network)
    teacher = PRESETS[chosen.teacher].config.model if chosen and chosen.teacher else None
    dtype = dtypes[precision]
    print(render_ranks(estimate_ranks(base, dtype, cluster, teacher), base, cluster, dtype))
    return 0
