"""Where a run computes and in which precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

from effkern.train.config import RunConfig


def choose_device(name: str) -> torch.device:
    """`auto` is cuda where there is one. Raises ValueError for a device that torch does not have here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"run.device must be auto, cpu or cuda[:index], got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"run.device must be one that torch sees, got {name!r} (torch.cuda.is_available() is False)")
    return device


def _cpu_has_bf16_products() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """dtype of the matrix products: torch.float32, or torch.bfloat16 (autocast).

    auto takes bf16 on CUDA devices that have it and on CPUs with bf16 dot products. Measured with
    `python -m effkern.train.device` on 2 cores of an AMD EPYC with avx512_bf16, forward and backward of the demo's
    student, 1024 tokens: 456 ms of CPU time in fp32, 308 ms in bf16. Without such instructions torch emulates bf16
    and is slower.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16_products() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to bf16, or nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def set_threads(run: RunConfig) -> None:
    """Apply run.threads, if it is not 0."""
    if run.threads:
        torch.set_num_threads(run.threads)


def _measure() -> None:
    """Print the time of a training step of the demo's student in both precisions."""
    import time

    from effkern.models import Decoder
    from effkern.ops.distill import linear_distill_loss
    from effkern.train.presets import PRESETS

    config = PRESETS["demo"].config
    tokens = torch.randint(0, config.model.vocab_size, (config.data.batch_size, config.data.seq_len + 1))
    for dtype in (torch.float32, torch.bfloat16):
        model, times = Decoder(config.model), []
        for _ in range(7):
            wall, cpu = time.perf_counter(), time.process_time()
            with autocast(torch.device("cpu"), dtype):
                hidden = model(tokens[:, :-1]).flatten(0, 1)
                loss = linear_distill_loss(hidden, model.head_weight, tokens[:, 1:].flatten()).loss
            loss.backward()
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
        wall, cpu = sorted(times)[len(times) // 2]
        print(f"{dtype}: {1e3 * wall:.0f} ms wall, {1e3 * cpu:.0f} ms CPU per step of {tokens[:, 1:].numel()} tokens")


if __name__ == "__main__":
    _measure()
