"""LAuReL residuals in miniature: the demo's corpus, a small decoder, equal tokens, several seeds.

    python -m benchmarks.laurel_quality [--seeds 3] [--steps 300] [--only rw plain] [--out FILE.json]

Every arm of a seed trains with the same batches in the same order; parameters that two arms share start alike. "one
more layer" is the plain decoder, one block deeper. Quoted are the final validation loss with mean and deviation over
seeds, the mean paired difference to plain with its standard deviation, and the wall time of a training step over
plain's of the same seed (evaluation not included; runs one after the other, so on a shared machine a rough figure).
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

from effkern.data import build_dataset
from effkern.data.dataset import PackedDataset
from effkern.models import DecoderConfig, LaurelConfig, count_parameters
from effkern.train.config import ScheduleConfig, TeacherConfig, TrainConfig
from effkern.train.loop import train
from effkern.train.presets import PRESETS

VOCAB = 4096


def arms(a: argparse.Namespace) -> dict[str, tuple[str, DecoderConfig]]:
    """Name and model of each arm."""
    plain = replace(
        PRESETS["demo"].config.model, hidden_size=a.width, num_layers=a.layers, mlp_size=3 * a.width, num_heads=4
    )

    def laurel(variant: str) -> DecoderConfig:
        config = LaurelConfig(variant, rank=a.rank, placement=a.placement, look_back=3, per_channel=a.per_channel)
        return replace(plain, residual="laurel", laurel=config)

    deeper = replace(plain, num_layers=a.layers + 1)
    return {
        "plain": (f"plain, {a.layers} layers", plain),
        "rw": ("RW", laurel("rw")),
        "rw+lr": (f"RW+LR, r={a.rank}", laurel("rw+lr")),
        "rw+lr+pa": (f"RW+LR+PA, r={a.rank}, k=3", laurel("rw+lr+pa")),
        "deeper": ("one more layer", deeper),
    }


def configure(model: DecoderConfig, a: argparse.Namespace, name: str, seed: int) -> TrainConfig:
    base = PRESETS["demo"].config
    run = replace(
        base.run, out=str(a.work / f"run-{name}-{seed}"), seed=seed, threads=a.threads, tensorboard=False, plot=False,
        eval_every=0, eval_tokens=32768, checkpoint_every=0,
    )  # fmt: skip
    data = replace(base.data, path=str(a.work / "data"), seed=seed)
    schedule = ScheduleConfig(steps=a.steps, mode="baseline")
    return replace(base, model=model, run=run, data=data, schedule=schedule, teacher=TeacherConfig())


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
    try:
        PackedDataset(a.work / "data")
    except FileNotFoundError:
        build_dataset(a.work / "data", ["stdlib"], vocab_size=VOCAB)
    records = []
    for seed in range(a.seeds):
        for key, (name, model) in arms(a).items():
            if a.only and key not in a.only:
                continue
            result = train(configure(model, a, key, seed), title=f"{name}, seed {seed}")
            if result.signum is not None:
                raise SystemExit(128 + result.signum)
            last = result.evals[-1]
            records.append(
                {
                    "arm": key, "name": name, "seed": seed, "parameters": count_parameters(model), "loss": last["loss"],
                    "accuracy": last["accuracy"], "step_s": result.state.wall_s / a.steps,
                }
            )  # fmt: skip
            print(json.dumps(records[-1]), flush=True)
    return records


def _spread(x: list[float]) -> float:
    return statistics.stdev(x) if len(x) > 1 else 0.0


def table(records: list[dict[str, Any]]) -> str:
    plain = {r["seed"]: r for r in records if r["arm"] == "plain"}
    lines = ["| residual | parameters | validation loss | - plain | step time / plain |", "|---" * 5 + "|"]
    for arm in dict.fromkeys(r["arm"] for r in records):
        rows = [r for r in records if r["arm"] == arm]
        losses = [r["loss"] for r in rows]
        gaps = [r["loss"] - plain[r["seed"]]["loss"] for r in rows if r["seed"] in plain]
        times = [r["step_s"] / plain[r["seed"]]["step_s"] for r in rows if r["seed"] in plain]
        compared = (
            f"{statistics.mean(gaps):+.4f} +- {_spread(gaps):.4f} | {statistics.median(times):.2f}" if gaps else " | "
        )
        lines.append(
            f"| {rows[0]['name']} | {rows[0]['parameters']} | {statistics.mean(losses):.4f} +- {_spread(losses):.4f} "
            f"| {compared} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--placement", choices=["attn", "ffn", "both", "block"], default="both")
    parser.add_argument("--per-channel", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], help="keys of arms")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/laurel_quality"), help="corpus and runs; resumed")
    parser.add_argument("--out", type=Path, help="write records and machine as JSON")
    a = parser.parse_args()
    records = measure(a)
    print(table(records))
    if a.out:
        case = {key: value for key, value in vars(a).items() if key not in ("work", "out", "only")}
        a.out.write_text(json.dumps({**case, **runner.machine(), "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
