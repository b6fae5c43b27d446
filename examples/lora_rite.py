"""LoRA-RITE on adapters of PEFT, or of effkern.nn.lora where PEFT is not installed.

    python examples/lora_rite.py [--steps N] [--own]

A Llama is trained on Python's documentation, frozen, and adapted with rank 4 to text without vowels. The same adapter
is trained by AdamW and by LoRA-RITE, and by each once more from factors that were rescaled, A / 10 and 10 B, with the
same product: LoRA-RITE's losses stay the same, AdamW's do not. Printed: cross entropy on held-out text afterwards.
"""

import argparse
import copy
import importlib.util

import torch
from corpus import VOCAB, batches, held_out
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from effkern.integrations.transformers import patch
from effkern.nn.lora import inject_lora
from effkern.optim import create, find_pairs

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RATES = {"adamw": 3e-3, "lora_rite": 3e-3}


def adapted(model: nn.Module, own: bool) -> nn.Module:
    """`model` with adapters, everything else frozen."""
    torch.manual_seed(1)
    if own or importlib.util.find_spec("peft") is None:
        model.requires_grad_(False)
        inject_lora(model, TARGETS, rank=4, alpha=8.0)
    else:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    for pair in find_pairs(model):
        # Not zero, so that there is a product to rescale.
        nn.init.normal_(pair.B, std=0.02)
    return model


def without_vowels(ids: Tensor) -> Tensor:
    vowels = torch.tensor(list(b"aeiouAEIOU"))
    return torch.where(torch.isin(ids, vowels), ord("_"), ids)


def fit(model: nn.Module, name: str, steps: int, rate: float, seed: int, change: bool) -> float:
    optimizer = create(name, model, lr=rate)
    for ids in batches(steps, seed=seed):
        ids = without_vowels(ids) if change else ids
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    ids = without_vowels(held_out()) if change else held_out()
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--own", action="store_true", help="effkern.nn.lora even where PEFT is installed")
    a = parser.parse_args(argv)
    torch.manual_seed(0)
    base = patch(LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    )))  # fmt: skip
    print(f"base model: {fit(base, 'adamw', 2 * a.steps, 3e-3, seed=1, change=False):.4f} nats per byte")
    start = adapted(base, a.own)
    print(f"adapters of {type(start).__module__.split('.')[0] if hasattr(start, 'peft_config') else 'effkern.nn.lora'}")
    for name, rate in RATES.items():
        found = []
        for scale in (1.0, 10.0):
            model = copy.deepcopy(start)
            with torch.no_grad():
                for pair in find_pairs(model):
                    pair.A.div_(scale)
                    pair.B.mul_(scale)
            found.append(fit(model, name, a.steps, rate, seed=2, change=True))
        print(f"{name}: {found[0]:.4f}, from rescaled factors {found[1]:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
