"""One-sided Shampoo in a loop of plain PyTorch, beside AdamW at the same rate and schedule.

    python examples/one_sided_shampoo.py [--steps N]

A small network predicts the next byte of Python's documentation from the sixteen before it. `create` gives matrices to
Shampoo and the rest to AdamW; the table says so. Printed: that table, and cross entropy on held-out text.
"""

import argparse

import torch
from corpus import VOCAB, batches, held_out
from torch import Tensor, nn

from effkern.optim import create, describe

WINDOW = 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        first, second = nn.Linear(16 * WINDOW, 256), nn.Linear(256, 128)
        self.body = nn.Sequential(first, nn.GELU(), nn.LayerNorm(256), second, nn.GELU())
        self.head = nn.Linear(128, VOCAB)

    def loss(self, ids: Tensor) -> Tensor:
        windows = ids.unfold(1, WINDOW + 1, 1).flatten(0, 1)
        logits = self.head(self.body(self.embed(windows[:, :-1]).flatten(1)))
        return nn.functional.cross_entropy(logits, windows[:, -1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args(argv).steps
    for name in ("adamw", "one_sided_shampoo"):
        torch.manual_seed(0)
        model = Net()
        optimizer = create(name, model, lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for ids in batches(steps, seed=1):
            optimizer.zero_grad()
            model.loss(ids).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            print(f"{name}: {model.loss(held_out()).item():.4f} nats per byte")
    print(describe(optimizer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
