"""A teacher that runs once: its sparse labels are stored, and two students learn from the file without it.

    python examples/cached_soft_labels.py [--steps N] [--k K]

A GPT-NeoX is trained on bytes of Python's documentation and labels every batch to come with its K likeliest next bytes
(`effkern.soft_labels`: from hidden states, without its logits). The labels go to a safetensors file; from there on they
are columns of a data set, `teacher_ids` and `teacher_logprobs`, which a patched student takes as they are. Printed:
size of the file beside that of whole distributions, and cross entropy on held-out text with and without labels.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from corpus import VOCAB, batches, held_out
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import effkern
from effkern.integrations.transformers import patch, teacher_hidden
from effkern.optim import create

LAYERS = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4}


def loss_on_held_out(model: nn.Module) -> float:
    ids = held_out()
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def write_labels(teacher: nn.Module, data: list[Tensor], k: int, path: Path) -> None:
    """Ids and log-probabilities [batch, row, position, K]; position t speaks of byte t + 1."""
    found = []
    for ids in data:
        rows = teacher_hidden(teacher, input_ids=ids)
        labels = effkern.soft_labels(rows.hidden.flatten(0, 1), rows.weight, method="topk", k=k)
        found.append((labels.ids.view(*ids.shape, k), labels.logprobs.view(*ids.shape, k)))
    ids, logprobs = (torch.stack(x) for x in zip(*found))
    save_file({"teacher_ids": ids.to(torch.int32), "teacher_logprobs": logprobs.half()}, path)


def fit(model: nn.Module, data: list[Tensor], labels: dict[str, Tensor]) -> float:
    optimizer = create("adamw", model, lr=3e-3)
    for step, ids in enumerate(data):
        columns = {name: column[step] for name, column in labels.items()}
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, **columns).loss.backward()
        optimizer.step()
    return loss_on_held_out(model)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="of the students; the teacher has three times as many")
    parser.add_argument("--k", type=int, default=32)
    a = parser.parse_args(argv)
    torch.manual_seed(0)
    teacher = patch(GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=96, intermediate_size=192, **LAYERS)))
    print(f"teacher: {fit(teacher, list(batches(3 * a.steps, seed=1)), {}):.3f} nats per byte")

    data = list(batches(a.steps, seed=2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.safetensors"
        write_labels(teacher.eval(), data, a.k, path)
        labels, size = load_file(path), path.stat().st_size
    print(f"labels: {size / 2**20:.2f} MiB; whole distributions in half precision: "
          f"{2 * VOCAB * sum(ids.numel() for ids in data) / 2**20:.2f} MiB")  # fmt: skip
    for name, columns in (("with labels", labels), ("without", {})):
        torch.manual_seed(0)
        student = LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=96, **LAYERS))
        patch(student, {"temperature": 1.0, "omega": 0.9, "teacher_kind": "tail_bucket"})
        print(f"student {name}: {fit(student, data, columns):.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
