"""The middle layers of a Qwen, run several times: more depth with the same weights and, in training, the same memory.

    python examples/loop_qwen.py [--steps N]

Three Qwen3 are trained on bytes of Python's documentation: four layers; the same with layers 1 and 2 run three times;
and eight layers, as deep as the looped one. Printed: cross entropy on held-out text, parameters, and text by the looped
model.
"""

import argparse

import torch
from corpus import VOCAB, batches, held_out
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from effkern.integrations.transformers import patch
from effkern.optim import create


def model_of(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16,
        )
    )  # fmt: skip


def fit(model: nn.Module, steps: int) -> float:
    optimizer, ids = create("adamw", model, lr=3e-3), held_out()
    for batch in batches(steps, seed=1):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args(argv).steps
    # recompute keeps the input of each loop alone; backward runs the loops again, with exact gradients.
    looped = patch(model_of(4), loop={"start": 1, "stop": 3, "loops": 3, "mode": "recompute"})
    models = {"4 layers": patch(model_of(4)), "4 layers, 2 of them three times": looped, "8 layers": patch(model_of(8))}
    for name, model in models.items():
        size = sum(p.numel() for p in model.parameters())
        print(f"{name}: {fit(model, steps):.3f} nats per byte, {size:,} parameters")
    prompt = torch.tensor([list(b"The class ")])
    written = looped.eval().generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    print(repr(bytes(written[0].tolist()).decode("utf-8", "replace")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
