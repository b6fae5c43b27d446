"""Addition of n numbers: a layer looped L times beside L layers and one.

    python -m benchmarks.papers.looped_addition [--models 6x1 1x6 1x1] [--seeds 2] [--out FILE.json]

Source: arXiv 2502.17416, section on synthetic tasks: operands of 3 digits, n up to 32, 12 layers of hidden size 256,
200000 steps of Adafactor on batches of 1024. Smaller here: digits, n, layers, width and steps as the options say;
AdamW. As there, n is drawn anew for each batch, answers have their most significant digit first, there is no chain of
thought, and an instance counts as right when every character of the answer is the most probable one, the end included.
The answer's earlier characters are given, which changes nothing where all are right.
"""

import argparse
import json
import statistics
import time
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner as runner  # isort: skip

import torch

from benchmarks.papers import looped_tasks as tasks
from benchmarks.papers import looped_training as training

TEST_ROWS, TEST_BATCHES = 512, 4


def test_batches(operands: int, digits: int) -> list[training.Batch]:
    generator = torch.Generator().manual_seed(10**6 + operands)
    return [tasks.addition(TEST_ROWS, operands, digits, generator) for _ in range(TEST_BATCHES)]


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
    records = training.earlier(a)
    done = {(r["model"], r["seed"]) for r in records}
    length = max(tasks.addition(1, n, a.digits, torch.Generator())[0].shape[1] for n in a.operands)
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        for stages in a.models:
            if (stages, seed) in done:
                continue
            generator = torch.Generator().manual_seed(seed)

            def batches(step: int, generator=generator) -> training.Batch:
                chosen = int(torch.randint(len(a.operands), (), generator=generator))
                return tasks.addition(a.batch, a.operands[chosen], a.digits, generator)

            model = training.decoder(stages, tasks.ADDITION_VOCAB, length, a.width, a.heads, seed)
            start = time.perf_counter()
            losses = training.train(model, batches, a.steps, a.lr, report=a.report)
            found = {str(n): training.accuracy(model, test_batches(n, a.digits)) for n in a.operands}
            records.append(
                {
                    "model": stages, "seed": seed, "parameters": training.parameters(model), "accuracy": found,
                    "loss": statistics.mean(losses[-20:]), "seconds": time.perf_counter() - start,
                }
            )  # fmt: skip
            print(json.dumps(records[-1]), flush=True)
            training.write(a, records)
    return records


def table(records: list[dict[str, Any]]) -> str:
    counts = list(records[0]["accuracy"])
    lines = [
        f"| model | parameters | {' | '.join(f'n = {n}' for n in counts)} | seeds |",
        "|---" * (len(counts) + 3) + "|",
    ]
    for model in dict.fromkeys(r["model"] for r in records):
        rows = [r for r in records if r["model"] == model]
        cells = [training.spread([r["accuracy"][n] for r in rows]) for n in counts]
        lines.append(f"| {model} | {rows[0]['parameters']} | {' | '.join(cells)} | {len(rows)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.common_options(parser, "6x1 1x6 1x1", steps=1000, seeds=2, lr=2e-3)
    parser.add_argument("--operands", type=int, nargs="+", default=[2, 4], help="values of n")
    parser.add_argument("--digits", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(table(measure(a)))


if __name__ == "__main__":
    main()
