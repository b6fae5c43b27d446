"""PNG curves. matplotlib is imported when a plot is made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effkern.train.compare import gaps

# One colour a run, distinguishable without colour vision; the teacher is grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
COLOURS = {"baseline": "#0072B2", "salt": "#D55E00", "teacher": "#777777"}


def _figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_run(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Training and validation loss, and accuracy, of one run over tokens."""
    figure, axes = _figure(2)
    steps = [record for record in records if record["kind"] == "train" and record["applied"]]
    evals = [record for record in records if record["kind"] == "eval"]
    left, right = axes[0]
    left.plot(
        [r["total_tokens"] for r in steps], [r["ce"] for r in steps], lw=0.6, color="#bbbbbb", label="training batch"
    )
    left.plot(
        [r["tokens"] for r in evals],
        [r["loss"] for r in evals],
        "o-",
        ms=3,
        color=COLOURS["baseline"],
        label="validation",
    )
    left.set(xlabel="tokens", ylabel="cross entropy, nats per token")
    left.legend(frameon=False)
    right.plot(
        [r["tokens"] for r in evals], [100 * r["accuracy"] for r in evals], "o-", ms=3, color=COLOURS["baseline"]
    )
    right.set(xlabel="tokens", ylabel="next-token accuracy, %")
    _tidy(axes)
    figure.savefig(path)


def plot_comparison(runs: dict[str, Any], switch_tokens: int, path: Path) -> None:
    """Validation loss over tokens and over FLOPs, accuracy, and SALT minus BASELINE at equal tokens.

    `runs[name]` has the key `evals`, a list of records with tokens, flops, loss and accuracy.
    """
    figure, axes = _figure(2, 2)
    loss, flops, accuracy, gap = axes.flat
    students = [name for name in ("baseline", "salt") if name in runs]
    for name in students:
        evals = runs[name]["evals"]
        style = {"color": COLOURS[name], "ms": 3, "label": name.upper()}
        tokens = [e["tokens"] / 1e6 for e in evals]
        loss.plot(tokens, [e["loss"] for e in evals], "o-", **style)
        flops.plot([e["flops"] / 1e12 for e in evals], [e["loss"] for e in evals], "o-", **style)
        accuracy.plot(tokens, [100 * e["accuracy"] for e in evals], "o-", **style)
    final = runs["teacher"]["evals"][-1]
    for axis, level in ((loss, final["loss"]), (flops, final["loss"]), (accuracy, 100 * final["accuracy"])):
        axis.axhline(level, color=COLOURS["teacher"], ls=":", label="teacher, trained")
    # The first evaluation is near ln V and would flatten the rest.
    top = max(e["loss"] for name in students for e in runs[name]["evals"][1:])
    bottom = min(final["loss"], *(e["loss"] for name in students for e in runs[name]["evals"]))
    for axis in (loss, flops):
        axis.set_ylim(bottom - 0.1, top + 0.1)
    # Both start alike; the first pair says nothing.
    points = gaps(runs["baseline"]["evals"], runs["salt"]["evals"])[1:]
    gap.plot([tokens / 1e6 for tokens, _ in points], [gain for _, gain in points], "o-", ms=3, color="#222222")
    gap.axhline(0, color="#bbbbbb", lw=0.8)
    for axis in (loss, accuracy, gap):
        axis.axvline(switch_tokens / 1e6, color="#222222", lw=0.8, ls="--")
        axis.set_xlabel("million tokens (dashed: teacher unloaded)")
    loss.set_ylabel("validation loss, nats per token")
    flops.set(
        xlabel="TFLOP of the student run with the teacher's forward passes", ylabel="validation loss, nats per token"
    )
    accuracy.set_ylabel("next-token accuracy, %")
    gap.set_ylabel("SALT - BASELINE, nats (< 0: SALT better)")
    loss.legend(frameon=False)
    _tidy(axes)
    figure.savefig(path)


def plot_finetune(report: dict[str, Any], path: Path) -> None:
    """Validation loss over tokens of every learning rate; the best of each optimizer in full colour."""
    names = {"adamw": ("AdamW", "#0072B2"), "lora_rite": ("LoRA-RITE", "#D55E00")}
    figure, axes = _figure(1)
    axis = axes[0][0]
    for name, runs in report["runs"].items():
        label, colour = names[name]
        for rate, run in runs.items():
            best = rate == f"{report['best'][name]:g}"
            style = {"label": f"{label}, {rate}"} if best else {"alpha": 0.35, "lw": 0.8}
            tokens = [e["tokens"] / 1e3 for e in run["evals"]]
            axis.plot(tokens, [e["loss"] for e in run["evals"]], "o-", ms=3, color=colour, **style)
    axis.set(xlabel="thousand tokens (faint: the other learning rates)", ylabel="validation loss, nats per token")
    axis.legend(frameon=False)
    _tidy(axes)
    figure.savefig(path)


def _tidy(axes: Any) -> None:
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.5)


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    xlabel: str,
    ylabel: str,
    colours: Mapping[str, int] | None = None,
) -> None:
    """One line a name; those with the same number in `colours` share a colour, and the first of them the label.

    Raises:
        ValueError: the ending of `path` is no picture's.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"plot: the file must end in .png, .svg or .pdf, got {path}")
    figure, axes = _figure(1)
    axis = axes[0][0]
    labelled: set[int] = set()
    for number, (name, (xs, ys)) in enumerate(curves.items()):
        group = number if colours is None else colours[name]
        label = None if group in labelled else name
        labelled.add(group)
        axis.plot(xs, ys, "o-", ms=3, lw=1, color=PALETTE[group % len(PALETTE)], label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    # The first validation is near ln V and would flatten the rest.
    later = [y for _, ys in curves.values() for y in ys[1:]]
    if later and max(later) > min(later):
        margin = 0.05 * (max(later) - min(later))
        axis.set_ylim(min(later) - margin, max(later) + margin)
    axis.legend(frameon=False)
    _tidy(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_ablation(
    arms: Mapping[str, dict[str, Any]], curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]], path: Path
) -> None:
    """Validation curves, one thin line a seed, and each arm's final loss minus the first arm's with its error."""
    figure, axes = _figure(2)
    left, right = axes[0]
    colour = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(arms)}
    later = []
    for name, seeds in curves.items():
        for number, points in enumerate(seeds):
            label = None if number else name
            xs, ys = [tokens / 1e6 for tokens, _ in points], [loss for _, loss in points]
            left.plot(xs, ys, lw=0.9, color=colour[name], label=label)
            later += ys[1:]
    left.set(xlabel="million tokens", ylabel="validation loss, nats per token")
    if later and max(later) > min(later):
        margin = 0.05 * (max(later) - min(later))
        left.set_ylim(min(later) - margin, max(later) + margin)
    left.legend(frameon=False)
    others = list(arms)[1:]
    for place, name in enumerate(others):
        value = arms[name]["difference"]
        right.errorbar(value["mean"], place, xerr=value["error"], fmt="o", color=colour[name], capsize=3)
    right.axvline(0, color="#bbbbbb", lw=0.8)
    right.set_yticks(range(len(others)), others)
    right.set_ylim(len(others) - 0.5, -0.5)
    right.set_xlabel(f"final loss minus {next(iter(arms))}'s, nats (< 0: better)")
    _tidy(axes)
    figure.savefig(path)
