"""LAuReL, the learned residual, put into a Llama that is trained already, and out again.

    python examples/laurel_llama.py [--steps N]

A Llama is trained on bytes of Python's documentation. `patch` makes its residual additions learned; the model computes
what it did, then trains on, against a copy without LAuReL. Printed: cross entropy on held-out text, and the parameters
that were added.
"""

import argparse
import copy

import torch
from corpus import VOCAB, batches, held_out
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from effkern.integrations.transformers import patch, unpatch
from effkern.optim import create


def loss_on_held_out(model: nn.Module) -> float:
    ids = held_out()
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def fit(model: nn.Module, steps: int, seed: int) -> float:
    # Weight decay for matrices alone: the scalars of LAuReL are none.
    optimizer = create("adamw", model, lr=3e-3, weight_decay=0.1)
    for ids in batches(steps, seed=seed):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return loss_on_held_out(model)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="before, and again after LAuReL is put in")
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    model = patch(LlamaForCausalLM(config))
    before = fit(model, steps, seed=1)
    plain = copy.deepcopy(model)
    size = sum(p.numel() for p in model.parameters())

    patch(unpatch(model), laurel={"variant": "rw+lr", "rank": 8})
    added = sum(p.numel() for p in model.parameters()) - size
    print(f"trained: {before:.4f} nats per byte; with LAuReL put in: {loss_on_held_out(model):.4f}")
    print(f"trained on: {fit(plain, steps, seed=2):.4f}; with LAuReL: {fit(model, steps, seed=2):.4f}")
    print(f"{added:,} parameters more than {size:,}")
    unpatch(model)
    assert sum(p.numel() for p in model.parameters()) == size
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
