"""The `effkern` command. Each subcommand imports what it needs when it runs, so that help comes at once.

Exit status: 0 done, 1 error (one line on stderr; EFFKERN_DEBUG=1 shows the traceback), 2 wrong usage,
128 + n ended by signal n with everything saved.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    import torch

    from effkern.train.restore import LoadedModel

# What a wrong input, file or stored run raises; anything else is a defect and shows its traceback.
_EXPECTED = (ValueError, OSError, ImportError, NotImplementedError)


def demo(arguments: Sequence[str]) -> int:
    """A small teacher and two students, and a report."""
    from effkern.cli_demo import demo as run

    return _tyro(run, "demo")(arguments)


def train(arguments: Sequence[str]) -> int:
    """Train one model; a run directory that holds checkpoints is resumed."""
    import argparse

    import tyro

    from effkern.train.config import TrainConfig
    from effkern.train.mapping import overlay, read_toml
    from effkern.train.presets import PRESETS, get_preset

    @dataclass
    class Train:
        """Train one model; a run directory that holds checkpoints is resumed.

        Values come from the preset, then from the config file, then from the command line.
        """

        settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
        preset: str = ""
        """demo, demo-teacher, small, small-teacher, paper-2.8b or paper-1.5b."""
        config: str = ""
        """TOML file: tables model, teacher, data, optimizer, schedule, run; preset = "NAME" may stand at its top."""
        dry_run: bool = False
        """Print sizes, memory and FLOPs, and stop."""

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="")
    first.add_argument("--config", default="")
    known, _ = first.parse_known_args(arguments)
    table = read_toml(known.config) if known.config else {}
    preset = known.preset or table.pop("preset", "")
    table.pop("preset", None)
    chosen = get_preset(preset) if preset else None
    base = overlay(chosen.config if chosen else TrainConfig(), table, source=known.config or "config")
    command = tyro.cli(Train, args=list(arguments), default=Train(base, preset, known.config), prog="effkern train")
    config = command.settings

    if command.dry_run:
        from effkern.train.device import choose_device, choose_precision
        from effkern.train.estimate import estimate, render

        dtype = choose_precision(config.run.precision, choose_device(config.run.device))
        teacher = PRESETS[chosen.teacher].config.model if chosen and chosen.teacher else _teacher_shape(config)
        print(render(estimate(config, dtype, teacher), config, dtype, chosen.unconfirmed if chosen else ()))
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


def _load(checkpoint: Path, device: str) -> "tuple[LoadedModel, torch.device, torch.dtype]":
    from effkern.train.device import choose_device, choose_precision
    from effkern.train.restore import load_model

    where = choose_device(device)
    return load_model(checkpoint, where), where, choose_precision("auto", where)


def evaluate(
    checkpoint: Path,
    data: Path,
    split: Literal["val", "train"] = "val",
    seq_len: int = 0,
    batch_size: int = 16,
    max_tokens: int = 0,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Loss, next-token accuracy and bits per byte of a trained model.

    Args:
        checkpoint: run directory or step directory.
        data: packed dataset with the model's tokenizer.
        split: which part of the dataset.
        seq_len: 0 takes the length of the model's training.
        batch_size: sequences of one forward pass.
        max_tokens: 0 is the whole split.
        device: auto, cpu or cuda.
        json: print JSON.
    """
    from json import dumps

    from effkern.data import PackedDataset, val_batches
    from effkern.train.evaluate import evaluate as measure

    loaded, _, dtype = _load(checkpoint, device)
    dataset = PackedDataset(data)
    if dataset.manifest.tokenizer.sha256 != loaded.inputs.tokenizer:
        raise ValueError(f"data must have the tokenizer that {loaded.path} was trained with, got another one in {data}")
    length = seq_len or loaded.meta["config"]["data"]["seq_len"]
    batches = val_batches(dataset, length, batch_size, max_tokens or None, split=split)
    result = measure(loaded.model, batches, dataset.bytes_per_token(split), dtype)
    if json:
        print(dumps({"checkpoint": str(loaded.path), "step": loaded.step, "split": split, **result.as_dict()}))
    else:
        print(
            f"{loaded.path} on {result.tokens:,} tokens of {split}: loss {result.loss:.4f} nats per token, accuracy "
            f"{100 * result.accuracy:.2f}%, {result.bits_per_byte:.4f} bits per byte"
        )
    return 0


def generate(
    checkpoint: Path,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    tokenizer: Path | None = None,
    device: str = "auto",
    loops: int = 0,
    kv_policy: str = "",
    exit: str = "",
) -> int:
    """Continue a prompt.

    Args:
        checkpoint: run directory or step directory.
        prompt: text to continue.
        max_new_tokens: at most this many; fewer at the end of the document.
        temperature: 0 takes the most likely token every time.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens up to this mass.
        seed: of the draws.
        tokenizer: tokenizer.json; by default the one in the run directory.
        device: auto, cpu or cuda.
        loops: of looped stages; 0 takes the model's.
        kv_policy: what looped stages keep: full, latest-available, last, cyclic-S, block-R or window-W.
        exit: leave the loop early: relative-change, cosine, entropy, kl, argmax-stable or gate-cdf, alone or =NUMBER.
    """
    import torch

    from effkern.data.tokenizer import load_encoder
    from effkern.models import generate_with_loops as sample

    loaded, where, _ = _load(checkpoint, device)
    path = tokenizer or loaded.path.parent.parent / "tokenizer.json"
    encoder = load_encoder(path)
    if encoder.sha256 != loaded.inputs.tokenizer:
        raise ValueError(f"tokenizer must be the one that {loaded.path} was trained with, got another one in {path}")
    ids = encoder.encode([prompt])[0] or [encoder.eos_id]
    found = sample(
        loaded.model,
        torch.tensor([ids], device=where),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        seed=seed,
        eos=encoder.eos_id,
        loops=loops or None,
        kv_policy=kv_policy or None,
        exit=exit or None,
    )
    print(prompt + encoder.tokenizer.decode(found.tokens[0, len(ids) :].tolist()))
    if exit:
        print(f"{found.loops.double().mean():.2f} loops a token, with {exit}", file=sys.stderr)
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


def doctor(json: bool = False) -> int:
    """What was built, and what each op will use on this machine.

    Args:
        json: print JSON.
    """
    from effkern.cli_doctor import main as report

    return report(json)


def bench(arguments: Sequence[str]) -> int:
    """Run the benchmark suite of a source checkout; arguments go to `python -m benchmarks`.

    `distill --explain` prints the cost model's table instead, and needs no checkout.
    """
    if arguments[:1] == ["distill"] and "--explain" in arguments:
        from effkern.ops.distill.explain import main as explain

        return explain(arguments[1:])
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise ValueError(
            "bench needs the folder benchmarks/ of a source checkout beside the package, got an installed package alone"
        )
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=root, check=False).returncode


def finetune(arguments: Sequence[str]) -> int:
    """LoRA on a trained checkpoint."""
    from effkern.cli_finetune import finetune as run

    return _tyro(run, "finetune")(arguments)


def estimate(arguments: Sequence[str]) -> int:
    """A step on several GPUs, before it runs."""
    from effkern.cli_estimate import estimate as run

    return _tyro(run, "estimate")(arguments)


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


def _tyro(function: Callable[..., int], name: str) -> Callable[[Sequence[str]], int]:
    def run(arguments: Sequence[str]) -> int:
        import tyro

        return tyro.cli(function, prog=f"effkern {name}", args=list(arguments))

    return run


_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "demo": ("train a teacher and two students on real text, write a report (minutes)", demo),
    "train": ("train one model: --preset NAME, --config FILE.toml, --dry-run", train),
    "estimate": ("memory, communication and time of a step on --gpus N: --preset NAME, --config FILE.toml", estimate),
    "finetune": ("train LoRA adapters on a checkpoint (LoRA-RITE, AdamW ...), merge and export", finetune),
    "eval": ("loss, accuracy and bits per byte of a checkpoint", _tyro(evaluate, "eval")),
    "generate": ("continue a prompt with a checkpoint", _tyro(generate, "generate")),
    "data": ("build, stats, soft-labels; dedup, embed, score, cluster, select, mix, report: choose the text", data),
    "doctor": ("what was built, and what each op uses here: --json", _tyro(doctor, "doctor")),
    "bench": ("benchmark suite of a source checkout; distill --explain: the cost model, anywhere", bench),
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
        print(f"effkern {name}: error: {error}", file=sys.stderr)
        return 1


def _is_expected(error: Exception) -> bool:
    if isinstance(error, _EXPECTED):
        return True
    # Their modules are loaded only by the commands that can raise them.
    homes = {
        "CheckpointError": "effkern.train.checkpoint",
        "RankError": "effkern.train.parallel",
        "TrainingDiverged": "effkern.train.loop",
    }
    kinds = [getattr(sys.modules[home], kind) for kind, home in homes.items() if home in sys.modules]
    return isinstance(error, tuple(kinds))
