"""The looping regulariser: how far it pulls the blocks of an unlooped model together, and what that costs.

    python -m benchmarks.papers.looped_regulariser [--weights 0 1 10] [--seeds 2] [--out FILE.json]

An L x 1 decoder trains on p-hop induction (see looped_p_hop.py, same curriculum and labels) with the loss
`task - weight * mean_G R_G` of effkern.loop_similarity, R_G the mean cosine between a parameter G of adjacent blocks of
k layers; the matrices of attention and of the FFN are the groups. Reported are the cosines at the start and at the end,
with the loss and accuracy of the task. Source: arXiv 2502.17416, which trains language models of 24 layers, k = 4, and
ends at about 0.98 with weight 10. The sign of the paper's print is the other one, which its cosines contradict.
"""

import argparse
import json
import statistics
import time
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner as runner  # isort: skip

import torch
from torch import Tensor

from benchmarks.papers import looped_p_hop as p_hop
from benchmarks.papers import looped_tasks as tasks
from benchmarks.papers import looped_training as training
from effkern.models import Decoder
from effkern.ops.loop_similarity import loop_similarity


def groups(model: Decoder) -> dict[str, list[Tensor]]:
    """The matrices of each layer by what they are; queries, keys and values are one matrix here."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "blocks" in parts and parameter.dim() == 2:
            found.setdefault(".".join(parts[parts.index("blocks") + 2 :]), []).append(parameter)
    return found


def cosines(model: Decoder, block: int) -> dict[str, float]:
    matrices = groups(model)
    with torch.no_grad():
        result = loop_similarity(matrices, block)
    return {"mean": result.mean.item(), **dict(zip(matrices, result.groups.tolist()))}


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
    records = training.earlier(a)
    done = {(r["weight"], r["seed"]) for r in records}
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        for weight in a.weights:
            if (weight, seed) in done:
                continue
            generator = torch.Generator().manual_seed(seed)
            curriculum = p_hop.Curriculum(a.hops, a.steps)

            def batches(step: int, generator=generator, curriculum=curriculum) -> training.Batch:
                tokens, _ = tasks.p_hop(a.batch, a.length, curriculum.hops, a.letters, generator)
                return tokens, tasks.p_hop_answers(tokens, curriculum.hops)

            model = training.decoder(f"{a.layers}x1", a.letters, a.length, a.width, a.heads, seed)
            matrices = groups(model)

            def penalty(matrices=matrices, weight=weight) -> Tensor:
                return -weight * loop_similarity(matrices, a.block).mean

            before, start = cosines(model, a.block), time.perf_counter()
            losses = training.train(
                model, batches, a.steps, a.lr, penalty=penalty if weight else None, watch=curriculum.watch,
                report=a.report,
            )  # fmt: skip
            records.append(
                {
                    "weight": weight, "seed": seed, "parameters": training.parameters(model), "cosines_at_start":
                    before, "cosines": cosines(model, a.block), "loss": statistics.mean(losses[-20:]), "accuracy":
                    training.accuracy(model, p_hop.test_batches(a)), "seconds": time.perf_counter() - start,
                }
            )  # fmt: skip
            print(json.dumps(records[-1]), flush=True)
            training.write(a, records)
    return records


def table(records: list[dict[str, Any]]) -> str:
    lines = ["| weight | mean cosine at the start | at the end | loss | accuracy | seeds |", "|---" * 6 + "|"]
    for weight in dict.fromkeys(r["weight"] for r in records):
        rows = [r for r in records if r["weight"] == weight]
        start, end = (training.spread([r[key]["mean"] for r in rows]) for key in ("cosines_at_start", "cosines"))
        loss, accuracy = (training.spread([r[key] for r in rows]) for key in ("loss", "accuracy"))
        lines.append(f"| {weight:g} | {start} | {end} | {loss} | {accuracy} | {len(rows)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.common_options(parser, "", steps=300, seeds=2, lr=2e-3)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 1.0, 10.0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--block", type=int, default=2, help="k, layers of a block")
    p_hop.task_options(parser)
    parser.set_defaults(hops=2, length=24)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(table(measure(a)))


if __name__ == "__main__":
    main()
