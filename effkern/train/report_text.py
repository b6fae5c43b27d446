"""report.md from the numbers of report.json. What it claims is decided by those numbers alone."""

from typing import Any


def verdict(findings: dict[str, Any]) -> list[str]:
    """What was found, as sentences. A difference below two standard errors of the validation set is called none."""
    stage, final, equal = findings["at_switch"], findings["final"], findings["equal_flops"]
    gap = final["salt_minus_baseline"]
    size, error = gap["difference"], gap["validation_standard_error"]
    early = stage["salt"] - stage["baseline"]
    word = "below" if early < 0 else "above"
    lines = [f"At the switch SALT's validation loss is {abs(early):.4f} nats {word} BASELINE's at equal tokens."]
    if abs(size) <= 2 * error:
        lines.append(f"At the end the two do not differ on this validation text ({size:+.4f} +- {error:.4f} nats).")
    elif size < 0:
        lines.append(f"At the end SALT is better by {-size:.4f} +- {error:.4f} nats.")
    else:
        lines.append(
            f"At the end SALT is WORSE by {size:.4f} +- {error:.4f} nats: at this size and budget it does not win."
        )
    extra = 100 * equal["salt_extra_flops_share"]
    if equal["salt"] is not None:
        difference = equal["salt"] - equal["baseline"]
        word = "below" if difference < 0 else "above"
        lines.append(
            f"SALT's run costs {extra:.1f}% more FLOPs (the teacher's forward passes). When it has spent "
            f"what BASELINE spends in all, its loss is {abs(difference):.4f} nats {word} BASELINE's final loss, "
            f"though its learning rate has not finished falling by then."
        )
    reach = equal["salt_flops_share_to_reach_baseline_final"]
    if reach is None:
        lines.append("SALT's curve never reaches BASELINE's final loss.")
    else:
        lines.append(
            f"SALT reaches BASELINE's final loss after {100 * reach:.0f}% of BASELINE's FLOPs, "
            f"the teacher's forward passes included."
        )
    cost = equal["teacher_training_flops_share"]
    saving = 0.0 if reach is None else 1.0 - reach
    word = "more" if cost > saving else "less"
    lines.append(
        f"Training the teacher, not counted above, cost {100 * cost:.0f}% of BASELINE's FLOPs: {word} than the "
        f"{100 * max(0.0, saving):.0f}% that SALT saves on the way to BASELINE's loss."
        + (" It pays where the teacher exists already." if cost > saving > 0 else "")
    )
    lines.append(_teachers_place(final))
    lines.append(
        "This is ONE seed: +- is the standard error over validation sequences; "
        "it does not say how another seed would come out."
    )
    return lines


def _teachers_place(final: dict[str, Any]) -> str:
    """Whether the students have outgrown their teacher, which decides what the result can be compared with."""
    loss = {name: final[name]["loss"] for name in ("teacher", "baseline", "salt")}
    if loss["teacher"] < min(loss["baseline"], loss["salt"]):
        return (
            f"With this few tokens the smaller teacher (loss {loss['teacher']:.4f}) is still ahead of both students: "
            "the gain is that of learning from a better model. The paper's students outgrow their teacher; "
            "this demo does not show that."
        )
    ahead = [name.upper() for name in ("baseline", "salt") if loss[name] <= loss["teacher"]]
    return f"Ahead of the smaller teacher (loss {loss['teacher']:.4f}) at the end: {', '.join(ahead)}."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def render_markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    runs, findings, timing, method = report["runs"], report["findings"], report["timing"], report["method"]
    names = list(runs)
    share = 100 * method["kd_steps"] / method["steps"]
    lines = ["# A small teacher helps a larger student: SALT in minutes", "", "## What was found", ""]
    lines += [f"- {line}" for line in verdict(findings)]
    lines += ["", "![curves](curves.png)", "", "## Final models, on the same validation text", ""]
    rows = []
    for name in names:
        final = runs[name]["final"]
        sizes = [f"{runs[name]['parameters']:,}", f"{runs[name]['tokens']:,}"]
        rows.append(
            [name, *sizes, f"{final['loss']:.4f}", f"{100 * final['accuracy']:.2f}%", f"{final['bits_per_byte']:.4f}"]
        )
    lines += _table(["model", "parameters", "tokens trained on", "loss, nats/token", "accuracy", "bits/byte"], rows)
    lines += ["", "## On the way, at equal tokens (validation loss)", ""]
    stage, late = findings["at_switch"], findings["at_70_percent"]
    rows = [
        [f"switch ({stage['tokens']:,} tokens)", _number(stage["baseline"]), _number(stage["salt"])],
        ["70% of the tokens", _number(late["baseline"]), _number(late["salt"])],
        ["equal FLOPs", _number(findings["equal_flops"]["baseline"]), _number(findings["equal_flops"]["salt"])],
    ]
    lines += _table(["where", "BASELINE", "SALT"], rows)
    lines += ["", "## By teacher confidence (final loss; a fifth of the tokens each)", ""]
    rows = []
    for bucket in findings["buckets_of_teacher_confidence"]:
        values = [f"{bucket[key]:.4f}" for key in ("teacher_entropy", "teacher", "baseline", "salt")]
        rows.append([*values, f"{bucket['salt'] - bucket['baseline']:+.4f}"])
    lines += _table(["teacher entropy", "teacher", "BASELINE", "SALT", "SALT - BASELINE"], rows)
    lines += [
        "",
        "## Time",
        "",
        f"{timing['machine']}; {timing['total_s']:.0f} s in all, {timing['data_s']:.0f} s of them for the corpus.",
        "",
    ]
    rows = []
    for name, t in timing["runs"].items():
        wall = [
            f"{t['wall_s']:.0f} s",
            f"{t['cpu_s']:.0f} s",
            f"{1e3 * t['step_s']:.0f} ms",
            f"{t['tokens_per_s']:,.0f}",
        ]
        rows.append([name, *wall, f"{100 * t['loss_op_share']:.0f}%", f"{100 * t['teacher_share']:.0f}%"])
    lines += _table(["run", "wall", "CPU", "step", "tokens/s", "loss op, of the step", "teacher, of the step"], rows)
    lines += ["", "## Samples (temperature 0.7, top-p 0.95)", ""]
    for sample in report["samples"]:
        for name in names:
            lines += [f"{name}:", "", _indent(sample["prompt"] + sample[name]), ""]
    lines += [
        "## How",
        "",
        f"SALT: omega {method['omega']}, teacher temperature {method['teacher_temperature']}, "
        f"transition {method['transition']}, "
        f"teacher in the first {method['kd_steps']} of {method['steps']} steps ({share:.0f}%). "
        "Same initial weights and same batches for both students; "
        f"{method['tokens']:,} tokens each, {method['precision']} products, seed {report['seed']}.",
        "",
        f"Corpus: {', '.join(report['corpus']['sources'])}, {report['corpus']['train_tokens']:,} training tokens, "
        f"manifest {report['corpus']['manifest_hash'][:16]}. "
        f"Versions: {', '.join(f'{k} {v}' for k, v in report['versions'].items())}.",
        "",
        "The preset's sizes, learning rates and omega come from a few short runs on this corpus with seed 0. "
        "Curves are measured on a part of the validation split, final numbers on more of it.",
    ]
    return "\n".join(lines) + "\n"
