"""p-hop induction: a layer looped six times beside six layers and one.

    python -m benchmarks.papers.looped_p_hop [--models 6x1 1x6 1x1] [--seeds 3] [--out FILE.json]

The last token of a sequence points to the token after its previous occurrence, that one on in the same way, p times;
the answer is the letter where this ends. Source: arXiv 2502.17416, section on synthetic tasks (p = 16 and 32, length
256, 200000 steps of Adafactor, hidden size 128). Smaller here, so that all runs take half an hour on two cores: p,
length, width and steps as the options say; AdamW. Also different: every position that has p hops is a label in
training, not the last one alone, and training starts at 1 hop, doubling to p when nine tenths of the labels are right,
or after its share of the first half of the steps. The test is the paper's: instances of the exact generator that
training never saw, the answer at the last position; accuracy of guessing is one in `letters`.
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


class Curriculum:
    """Hops of the next step."""

    def __init__(self, hops: int, steps: int) -> None:
        self.stages = [1]
        while self.stages[-1] < hops:
            self.stages.append(min(hops, 2 * self.stages[-1]))
        self.share = steps // (2 * len(self.stages))
        self.at, self.since, self.recent = 0, 0, [0.0]
        self.reached: list[int] = []

    @property
    def hops(self) -> int:
        return self.stages[self.at]

    def watch(self, step: int, share: float) -> None:
        self.recent = [*self.recent[-19:], share]
        if self.at + 1 < len(self.stages) and (
            (len(self.recent) == 20 and statistics.mean(self.recent) > 0.9) or step - self.since >= self.share
        ):
            self.at, self.since, self.recent = self.at + 1, step, [0.0]
            self.reached.append(step)


def test_batches(a: argparse.Namespace) -> list[training.Batch]:
    generator = torch.Generator().manual_seed(10**6)
    batches = []
    for _ in range(TEST_BATCHES):
        tokens, answers = tasks.p_hop(TEST_ROWS, a.length, a.hops, a.letters, generator)
        labels = torch.full_like(tokens, -100)
        labels[:, -1] = answers
        batches.append((tokens, labels))
    return batches


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
    records = training.earlier(a)
    done = {(r["model"], r["seed"]) for r in records}
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        for stages in a.models:
            if (stages, seed) in done:
                continue
            generator = torch.Generator().manual_seed(seed)
            curriculum = Curriculum(a.hops, a.steps)

            def batches(step: int, generator=generator, curriculum=curriculum) -> training.Batch:
                tokens, _ = tasks.p_hop(a.batch, a.length, curriculum.hops, a.letters, generator)
                return tokens, tasks.p_hop_answers(tokens, curriculum.hops)

            model = training.decoder(stages, a.letters, a.length, a.width, a.heads, seed)
            start = time.perf_counter()
            losses = training.train(model, batches, a.steps, a.lr, watch=curriculum.watch, report=a.report)
            records.append(
                {
                    "model": stages, "seed": seed, "parameters": training.parameters(model),
                    "accuracy": training.accuracy(model, test_batches(a)), "loss": statistics.mean(losses[-20:]),
                    "hops_doubled_at": curriculum.reached, "seconds": time.perf_counter() - start,
                }
            )  # fmt: skip
            print(json.dumps(records[-1]), flush=True)
            training.write(a, records)
    return records


def table(records: list[dict[str, Any]], letters: int) -> str:
    lines = [f"| model | parameters | accuracy (guessing {1 / letters:.2f}) | seeds |", "|---" * 4 + "|"]
    for model in dict.fromkeys(r["model"] for r in records):
        rows = [r for r in records if r["model"] == model]
        found = training.spread([r["accuracy"] for r in rows])
        lines.append(f"| {model} | {rows[0]['parameters']} | {found} | {len(rows)} |")
    return "\n".join(lines)


def task_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hops", type=int, default=4, help="p")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--letters", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.common_options(parser, "6x1 1x6 1x1", steps=1000, seeds=3, lr=2e-3)
    task_options(parser)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(table(measure(a), a.letters))


if __name__ == "__main__":
    main()
