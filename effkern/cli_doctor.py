"""`effkern doctor`: what was built, what this machine offers, what each op will use here and why."""

import json
import platform
from importlib import import_module, metadata
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

import torch

import effkern
from effkern import native, ops
from effkern.ops import registry

MODULES = {
    "_C": "C++ CPU kernels",
    "_C_cuda": "CUDA C++ kernels",
    "_data": "token packing, batches, soft labels, clusters",
}


NOTES = {"lora_rite": "ranks above 128 take LAPACK's eigenvectors; on CUDA torch's operations and its eigensolver"}


def report() -> dict[str, Any]:
    """Everything `effkern doctor` prints, as plain values."""
    for module in iter_modules(ops.__path__, "effkern.ops."):
        if module.ispkg:
            import_module(module.name)
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {
        "notes": NOTES,
        "versions": {
            "effkern": effkern.__version__,
            "torch": torch.__version__,
            "triton": metadata.version("triton") if find_spec("triton") else None,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "modules": {name: {"what": what, "problem": native.load(name)} for name, what in MODULES.items()},
        "cpu": {
            "clones": list(native.CPU_CLONES),
            "used": native.cpu_clone(),
            "threads": torch.get_num_threads(),
        },
        "cuda": {
            "architectures": list(native.CUDA_ARCHITECTURES),
            "devices": [torch.cuda.get_device_name(d) for d in devices if d.type == "cuda"],
        },
        "ops": {name: {str(d): explain(name, d) for d in devices} for name in sorted(registry.registered())},
    }


def explain(op: str, device: torch.device) -> dict[str, Any]:
    """The implementation that `impl="auto"` takes on `device`, and why not the ones before it."""
    passed_over: dict[str, str] = {}
    for implementation in registry.registered()[op]:
        reason = implementation.unavailable(device)
        if reason is None:
            return {"uses": implementation.name, "not": passed_over}
        passed_over[implementation.name] = reason
    raise AssertionError(f"{op} has no implementation for {device}; the reference runs anywhere")


def as_table(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["versions"]
    lines += [f"  {name:<10} {version or '-'}" for name, version in found["versions"].items()]
    lines.append("compiled modules")
    for name, module in found["modules"].items():
        lines.append(f"  effkern.{name:<8} {'ok' if module['problem'] is None else 'no':<3} {module['what']}")
        if module["problem"]:
            lines.append(f"  {'':<16} {module['problem']}")
    cpu, cuda = found["cpu"], found["cuda"]
    lines.append(f"cpu: clone {cpu['used']} of {', '.join(cpu['clones'])}; {cpu['threads']} threads")
    lines.append(f"cuda: kernels for {', '.join(cuda['architectures'])}; {', '.join(cuda['devices']) or 'no device'}")
    lines.append("ops")
    for op, devices in found["ops"].items():
        for device, choice in devices.items():
            lines.append(f"  {op} on {device}: {choice['uses']}")
            lines += [f"      not {name}: {reason}" for name, reason in choice["not"].items()]
        if op in found["notes"]:
            lines.append(f"      {found['notes'][op]}")
    return "\n".join(lines)


def main(as_json: bool) -> int:
    found = report()
    print(json.dumps(found, indent=2) if as_json else as_table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(as_json=False))
