"""Data curation in miniature: which embedding gathers examples of like loss, and what selections do to a model.

    python -m benchmarks.papers.curation --out runs/curation [--seeds 3] [--arms]

Text: the standard library of this Python, code and documentation as two sources, through `effkern data`: dedup, build,
mix. A proxy (2 layers of 96) and a target (3 layers of 160) train on all of it. Half of the text is held out: its
windows are embedded by the trained and by an untrained proxy, clustered into balanced clusters of several sizes, and
the target's losses give variance reduction (VR) and purity beside those of a partition by lot. Mean and range over
seeds of the clustering; one proxy and one target, so the spread over trainings is not in it.

With --arms half of the training windows are chosen by diversity, by SALT_DS (scores of an early checkpoint of the
proxy; masked tokens are dropped, as so small a model has few windows with half of their tokens among its ten
likeliest) and by lot, and a model as large as the target trains on each at equal tokens; validation is of 65536
held-out tokens of each source. One seed: differences of a few hundredths of a nat say nothing.

Finished steps in --out are kept: the command goes on where it was stopped. Source: arXiv 2502.02494, in miniature.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import numpy as np
import torch

from effkern import cli
from effkern.data import PackedDataset, val_batches
from effkern.data.curation import Artifact, Pool, balanced_kmeans, cluster_scores, open_artifact, steps
from effkern.data.curation.artifact import MANIFEST
from effkern.data.order import permute
from effkern.models import Decoder
from effkern.train.evaluation import evaluate
from effkern.train.restore import load_model, weights_digest

LENGTH, ROWS, VOCAB = 128, 16, 4096
SOURCES = ("code", "docs")
SHAPES = {"proxy": (2, 96, 4), "target": (3, 160, 5)}
ARMS = ("diverse", "salt-ds", "random")


def command(*words: object) -> None:
    """One command of effkern, which must succeed."""
    line = [str(word) for word in words]
    print("$ effkern", " ".join(line), flush=True)
    start = time.monotonic()
    status = cli.main(line)
    print(f"  {time.monotonic() - start:.1f} s", flush=True)
    if status:
        raise SystemExit(f"status {status}")


def once(done: Path, *words: object) -> None:
    if not done.exists():
        command(*words)


def corpus(out: Path, megabytes: float) -> None:
    """Both sources without duplicates, packed with one tokenizer: half of each held out; and all of it as one."""
    kept = []
    for name in SOURCES:
        folder = out / f"{name}.dedup"
        once(folder / MANIFEST, "data", "dedup", "--out", folder, "--sources", f"stdlib-{name}", "--workers", 0)
        kept.append(folder / "kept.jsonl")
    size = ("--max-bytes", int(megabytes * 1e6), "--val-fraction", 0.5)
    build = ("--vocab-size", VOCAB, *size)
    once(out / "both" / "manifest.json", "data", "build", "--out", out / "both", "--sources", *kept, *build)
    for name, file in zip(SOURCES, kept):
        tokenizer = ("--tokenizer", out / "both" / "tokenizer.json")
        once(out / name / "manifest.json", "data", "build", "--out", out / name, "--sources", file, *tokenizer, *size)
    pool = Pool([out / name for name in SOURCES], LENGTH)
    datasets = [out / name for name in SOURCES]
    once(out / "all" / "manifest.json", "data", "mix", "--out", out / "all", "--data", *datasets, "--seq-len", LENGTH,
         "--windows", len(pool))  # fmt: skip


def train(out: Path, name: str, data: Path, shape: str, num_steps: int, early: int = 0) -> None:
    layers, width, heads = SHAPES[shape]
    if not (out / name / "result.json").exists():
        command(
            "train", "--model.vocab-size", PackedDataset(data).vocab_size, "--model.hidden-size", width,
            "--model.num-layers", layers, "--model.num-heads", heads, "--model.num-kv-heads", heads,
            "--model.mlp-size", 8 * width // 3, "--model.max-seq-len", LENGTH, "--data.path", data,
            "--data.seq-len", LENGTH, "--data.batch-size", ROWS, "--optimizer.lr", 3e-3, "--schedule.steps", num_steps,
            "--run.out", out / name, "--run.device", "cpu", "--run.eval-every", num_steps, "--run.eval-tokens", 16384,
            "--run.checkpoint-every", early or 50, "--run.keep-last", 100,
            "--run.no-tensorboard", "--run.no-plot",
        )  # fmt: skip


def embeddings(out: Path, kind: str, trained: bool, components: int) -> Artifact:
    """Of the held-out windows, by the proxy or by its twin without training."""
    pool = Pool([out / name for name in SOURCES], LENGTH, "val")
    folder = out / f"{kind}-{'trained' if trained else 'untrained'}"
    if (folder / MANIFEST).exists():
        return open_artifact(folder, "embeddings")
    model = load_model(out / "proxy").model
    if not trained:
        model = Decoder(model.config, seed=1).eval().requires_grad_(False)
    return steps.embed(model, weights_digest(model), pool, folder, kind=kind, components=components)


def quality(out: Path, sizes: list[int], seeds: int, components: int) -> list[dict[str, Any]]:
    pool = Pool([out / name for name in SOURCES], LENGTH, "val")
    held_out = ("--data", *(out / name for name in SOURCES), "--split", "val", "--device", "cpu")
    once(out / "losses" / MANIFEST, "data", "score", "--out", out / "losses", *held_out, "--checkpoint", out / "target")
    losses, sources = open_artifact(out / "losses").load("loss"), pool.source(np.arange(len(pool)))
    found = []
    for trained in (True, False):
        for kind in ("token", "output"):
            points = torch.from_numpy(embeddings(out, kind, trained, components).load("embeddings"))
            for size in sizes:
                scores, drawn = [], []
                for seed in range(seeds):
                    labels = balanced_kmeans(points, size, seed=seed)
                    scores.append(cluster_scores(labels, losses, sources))
                    order = permute(np.arange(len(labels), dtype=np.int64), len(labels), f"partition:{seed}")
                    drawn.append(cluster_scores(labels[order], losses, sources))
                row = {
                    "embedding": kind, "trained": trained, "size": size, "examples": len(pool),
                    "vr": [s.variance_reduction for s in scores], "purity": [s.purity for s in scores],
                    "random_vr": [s.variance_reduction for s in drawn], "random_purity": [s.purity for s in drawn],
                    "smallest": min(s.smallest for s in scores), "largest": max(s.largest for s in scores),
                }  # fmt: skip
                found.append(row)
    return found


def span(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def show(rows: list[dict[str, Any]]) -> None:
    print("| embedding | n | VR | purity | by lot: VR | by lot: purity | sizes |\n|---|---|---|---|---|---|---|")
    for r in rows:
        name = f"{r['embedding']}, {'trained' if r['trained'] else 'untrained'}"
        cells = (span(r["vr"], 2), span(r["purity"], 3), span(r["random_vr"], 3), span(r["random_purity"], 3))
        print(f"| {name} | {r['size']} | {' | '.join(cells)} | {r['smallest']}-{r['largest']} |", flush=True)


def arms(out: Path, early: int, num_steps: int, components: int) -> dict[str, Any]:
    """Half of the training windows by three choices, a model on each, its loss on the held-out text of all sources."""
    data = ("--data", *(out / name for name in SOURCES), "--device", "cpu")
    checkpoint = out / "proxy" / "checkpoints" / f"step-{early:08d}"
    once(out / "train-scores" / MANIFEST, "data", "score", "--out", out / "train-scores", *data, "--checkpoint",
         checkpoint, "--masked", "drop")  # fmt: skip
    once(out / "train-output" / MANIFEST, "data", "embed", "--out", out / "train-output", *data, "--checkpoint",
         out / "proxy", "--kind", "output", "--components", components)  # fmt: skip
    once(out / "tree" / MANIFEST, "data", "cluster", "--out", out / "tree", "--embeddings", out / "train-output",
         "--device", "cpu")  # fmt: skip
    windows = len(Pool([out / name for name in SOURCES], LENGTH))
    step = {"diverse": out / "tree", "salt-ds": out / "train-scores", "random": out / "train-scores"}
    found: dict[str, Any] = {}
    for arm in ARMS:
        chosen = out / f"select-{arm}"
        once(chosen / MANIFEST, "data", "select", "--out", chosen, "--step", step[arm], "--method", arm, "--budget",
             windows // 2)  # fmt: skip
        once(out / f"mix-{arm}" / "manifest.json", "data", "mix", "--out", out / f"mix-{arm}", "--selection", chosen,
             "--windows", windows // 2)  # fmt: skip
        train(out, f"target-{arm}", out / f"mix-{arm}", "target", num_steps)
        model = load_model(out / f"target-{arm}").model
        losses = {}
        for name in SOURCES:
            dataset = PackedDataset(out / name)
            batches = val_batches(dataset, LENGTH, ROWS, 65536)
            losses[name] = evaluate(model, batches, dataset.bytes_per_token("val")).loss
        found[arm] = {"loss": losses, "kept": open_artifact(chosen).results["by_source"]}
        print(f"{arm}: validation loss {losses}, mean {statistics.mean(losses.values()):.4f}", flush=True)
    command("data", "report", "--out", out / "report.html", "--steps", *(out / f"{n}.dedup" for n in SOURCES),
            *(out / f"select-{arm}" for arm in ARMS))  # fmt: skip
    command("data", "select", "--replay", out / "select-diverse", "--out", out / "replayed", "--overwrite")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=3.0, help="of each source")
    parser.add_argument("--proxy-steps", type=int, default=300)
    parser.add_argument("--target-steps", type=int, default=150)
    parser.add_argument("--early", type=int, default=100, help="step of the proxy that SALT_DS takes")
    parser.add_argument("--components", type=int, default=32)
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 50, 150])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", action="store_true", help="also train on selections")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(json.dumps(runner.machine()))
    corpus(a.out, a.megabytes)
    train(a.out, "proxy", a.out / "all", "proxy", a.proxy_steps, a.early)
    train(a.out, "target", a.out / "all", "target", a.target_steps)
    rows = quality(a.out, a.sizes, a.seeds, a.components)
    show(rows)
    figures: dict[str, Any] = {"machine": runner.machine(), "quality": rows}
    figures["dedup"] = {n: open_artifact(a.out / f"{n}.dedup").results["documents"] for n in SOURCES}
    if a.arms:
        figures["arms"] = arms(a.out, a.early, a.target_steps, a.components)
    if a.json:
        a.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
