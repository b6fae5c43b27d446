"""The `effkern` command. Each subcommand imports what it needs when it runs, so that help comes at once.

Exit status: 0 done, 1 error (one line on stderr; EFFKERN_DEBUG=1 shows the traceback), 2 wrong usage,
128 + n ended by signal n with everything saved.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

# What a wrong input, file or stored run raises; anything else is a defect and shows its traceback.
_EXPECTED = (ValueError, OSError, ImportError, NotImplementedError)


def train(arguments: Sequence[str]) -> int:
    """Train one model; a run directory that holds checkpoints is resumed."""
    import tyro

    from effkern.cli_settings import starting_point
    from effkern.train.config import TrainConfig
    from effkern.train.presets import PRESETS

    @dataclass
    class Train:
        """Train one model; a run directory that holds checkpoints is resumed.

        Values come from the preset, then from the config file, then from the command line.
        """

        settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
        preset: str = ""
        """demo, demo-teacher, demo-composed, small, small-teacher; papers: paper-2.8b, paper-1.5b (SALT), paper-24x1,
        paper-12x1, paper-12x2, paper-middle-loop (loops), paper-laurel, paper-c4-24, paper-c4-28 (LAuReL)."""
        config: str = ""
        """TOML file: tables model, teacher, data, optimizer, schedule, run; preset = "NAME" may stand at its top."""
        dry_run: bool = False
        """Print sizes, memory and FLOPs, and stop."""

    base, preset, file, chosen = starting_point(arguments)
    command = tyro.cli(Train, args=list(arguments), default=Train(base, preset, file), prog="effkern train")
    config = command.settings

    if command.dry_run:
        from effkern.ops.distill.chunked import chunk_bytes
        from effkern.train.device import choose_device, choose_precision
        from effkern.train.estimate import estimate, render

        device = choose_device(config.run.device)
        dtype, budget = choose_precision(config.run.precision, device), chunk_bytes(device)
        teacher = PRESETS[chosen.teacher].config.model if chosen and chosen.teacher else _teacher_shape(config)
        print(render(estimate(config, dtype, teacher, budget), config, dtype, chosen.unconfirmed if chosen else ()))
        return 0
    return _train(config, f"effkern train {' '.join(arguments)}")


def _teacher_shape(config: Any) -> Any:
    if not config.teacher.checkpoint:
        return None
    from effkern.train.restore import load_model

    return load_model(config.teacher.checkpoint).model.config


def _train(config: Any, command: str) -> int:
    from effkern.train.loop import train as run

    result = run(config)
    if int(os.environ.get("RANK", "0")) > 0:
        return 0 if result.signum is None else 128 + result.signum
    if result.signum is not None:
        print(f"stopped by signal {result.signum} after step {result.state.step}; saved. To go on:\n  {command}")
        return 128 + result.signum
    last = result.evals[-1]
    print(
        f"{result.out}: {result.parameters:,} parameters, {result.state.tokens:,} tokens, {result.state.wall_s:.0f} s; "
        f"validation loss "
        f"{last['loss']:.4f}, accuracy {100 * last['accuracy']:.2f}%, {last['bits_per_byte']:.4f} bits per byte; "
        f"loss op {100 * result.loss_op_share:.0f}% of the step"
    )
    return 0


def data_build(
    out: Path,
    sources: tuple[str, ...] = ("stdlib",),
    vocab_size: int = 4096,
    tokenizer: Path | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    max_bytes: int = 0,
    text_field: str = "text",
    overwrite: bool = False,
) -> int:
    """Pack text into a token dataset.

    Args:
        out: folder to create.
        sources: stdlib, stdlib-code, stdlib-docs, hf:NAME, files, folders or globs (.txt .py .md .jsonl[.gz|.zst]).
        vocab_size: of the byte-level BPE that is trained.
        tokenizer: tokenizer.json to use instead of training one.
        val_fraction: share of the files that goes to validation.
        seed: of split and order.
        max_bytes: limit on the text; 0 takes all of it.
        text_field: field of a jsonl record.
        overwrite: replace a finished dataset.
    """
    from effkern.data import build_dataset, format_stats, stats

    seen: set[str] = set()

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            print(f"{stage} ...", flush=True)

    build_dataset(
        out,
        sources,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        val_fraction=val_fraction,
        seed=seed,
        max_bytes=max_bytes or None,
        text_field=text_field,
        overwrite=overwrite,
        progress=progress,
    )
    print(format_stats(stats(out)))
    return 0


def data_stats(path: Path, json: bool = False) -> int:
    """What a packed dataset holds.

    Args:
        path: its folder.
        json: print JSON.
    """
    from json import dumps

    from effkern.data import format_stats, stats

    numbers = stats(path)
    print(dumps(numbers) if json else format_stats(numbers))
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """What was built, and what each op will use on this machine. Needs no extra, as it helps where one is missing."""
    from argparse import ArgumentParser

    from effkern.cli_doctor import main as report

    parser = ArgumentParser(prog="effkern doctor", description="What was built, what each op uses here, and why.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return report(parser.parse_args(arguments).json)


def bench(arguments: Sequence[str]) -> int:
    """`python -m benchmarks` of a source checkout: run, check, compare, report, baseline, scaling, or one op.

    `distill --explain` prints the cost model's table, and needs no checkout.
    """
    if arguments[:1] == ["distill"] and "--explain" in arguments:
        from effkern.ops.distill.explain import main as explain

        return explain(arguments[1:])
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise ValueError(
            "bench needs the folder benchmarks/ of a source checkout beside the package, got an installed package alone"
        )
    # Not in the checkout's folder: files that the arguments name are where the user is.
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def data(arguments: Sequence[str]) -> int:
    """The subcommands of `effkern data`."""
    import tyro

    commands: dict[str, Callable[..., int]] = {"build": data_build, "stats": data_stats}
    # Its arguments are a dataclass of the trainer, so that its import takes as long as torch's.
    if list(arguments[:1]) not in (["build"], ["stats"]):
        from effkern.cli_data import COMMANDS
        from effkern.cli_soft_labels import soft_labels

        commands |= {"soft-labels": soft_labels, **COMMANDS}
    return tyro.extras.subcommand_cli_from_dict(commands, prog="effkern data", args=list(arguments))


def finetune(arguments: Sequence[str]) -> int:
    """LoRA adapters on a checkpoint."""
    from effkern.cli_finetune import main as run

    return run(arguments)


def ablate(arguments: Sequence[str]) -> int:
    """Features alone and together, over seeds, at equal tokens."""
    from effkern.cli_ablate import ablate as run

    return run(arguments)


def runs(arguments: Sequence[str]) -> int:
    """The subcommands of `effkern runs`."""
    from effkern.cli_runs import runs as run

    return run(arguments)


def _tyro(function: Callable[..., int], name: str) -> Callable[[Sequence[str]], int]:
    def run(arguments: Sequence[str]) -> int:
        import tyro

        return tyro.cli(function, prog=f"effkern {name}", args=list(arguments))

    return run


def _from(module: str, function: str, name: str) -> Callable[[Sequence[str]], int]:
    """A command whose module is imported when it runs."""

    def run(arguments: Sequence[str]) -> int:
        return _tyro(getattr(import_module(module), function), name)(arguments)

    return run


_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "demo": (
        "train a teacher and two students on real text, write a report (minutes)",
        _from("effkern.cli_demo", "demo", "demo"),
    ),
    "train": ("train one model: --preset NAME, --config FILE.toml, --dry-run", train),
    "estimate": (
        "a step on --gpus N: memory, communication, time; --preset NAME, --config FILE.toml",
        _from("effkern.cli_estimate", "estimate", "estimate"),
    ),
    "finetune": (
        "train LoRA adapters on a checkpoint (LoRA-RITE, AdamW ...), merge and export",
        finetune,
    ),
    "eval": ("loss, perplexity and accuracy of a checkpoint; --tasks", _from("effkern.cli_model", "evaluate", "eval")),
    "generate": ("continue a prompt with a checkpoint", _from("effkern.cli_model", "generate", "generate")),
    "export": ("write a checkpoint for Hugging Face transformers", _from("effkern.cli_model", "export", "export")),
    "ablate": ("train a grid of features over seeds at equal tokens; one table, one plot", ablate),
    "runs": ("list, show, compare and plot the runs below a folder", runs),
    "data": ("build, stats, soft-labels; dedup, embed, score, cluster, select, mix, report: choose the text", data),
    "doctor": ("what was built, and what each op uses here: --json", doctor),
    "bench": ("benchmarks of a source checkout: run, check, compare, report, OP --explain ...", bench),
}


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {about}" for name, (about, _) in _COMMANDS.items())
    last = "effkern COMMAND --help shows the arguments of a command."
    return f"usage: effkern COMMAND [ARGUMENTS]\n\n{lines}\n\n{last}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        from effkern import __version__

        print(__version__)
        return 0
    if name not in _COMMANDS:
        print(f"effkern: unknown command {name!r}\n{_usage()}", file=sys.stderr)
        return 2
    try:
        return _COMMANDS[name][1](rest)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone (| head); what Python still holds must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("EFFKERN_DEBUG") == "1" or not _is_expected(error):
            raise
        from effkern.extras import advice

        print(f"effkern {name}: error: {advice(error) or error}", file=sys.stderr)
        return 1


def _is_expected(error: Exception) -> bool:
    if isinstance(error, _EXPECTED):
        return True
    # Their modules are loaded only by the commands that can raise them.
    homes = {
        "CheckpointError": "effkern.train.checkpoint",
        "InUse": "effkern.data.lock",
        "RankError": "effkern.train.parallel",
        "TrainingDiverged": "effkern.train.loop",
    }
    kinds = [getattr(sys.modules[home], kind) for kind, home in homes.items() if home in sys.modules]
    return isinstance(error, tuple(kinds))
