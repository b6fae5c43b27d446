"""The trainer in two and four processes equals the trainer in one, up to the order of sums in float32.

Every rank computes its rows of the same batches, so nothing differs but where sums over tokens are cut: each partial
sum is off by some 2^-24 of its size, in gradients and in losses. BOUND, relative, is 250 times that for 12 steps of
AdamW and Shampoo; measured: up to 5e-6 (the norm of the gradient; the loss: 3e-7). Two ranks even give the very bits of
one process that accumulates two micro-batches, as (a + b) / 2 is exact.
"""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

# ruff: noqa: E402
# On a bare GPU machine, without what the trainer needs, there is nothing to collect.
NEEDED = ("numpy", "tokenizers", "safetensors", "rich")
if not all(find_spec(name) for name in NEEDED):
    pytest.skip(f"needs {NEEDED}", allow_module_level=True)

from effkern import cli
from effkern.data import PackedDataset
from effkern.data.curation.artifact import finish
from effkern.data.curation.pool import Pool
from effkern.models import LaurelConfig
from effkern.models.loop_config import LoopConfig
from effkern.train.checkpoint import Checkpoint, load_newest, read_meta, save_checkpoint
from effkern.train.config import ScheduleConfig, TeacherConfig, TrainConfig
from effkern.train.estimate_ranks import Cluster, estimate_ranks
from effkern.train.finetune import finetune_config
from effkern.train.loop import Trainer
from effkern.train.restore import load_model, weights_digest
from effkern.train.soft_labels import LabelOptions, SoftLabelJob
from tests.distributed import train_worker as worker
from tests.distributed.spawn import spawn
from tests.distributed.train_worker import DDP, FSDP, HSDP, STOP, VOCAB, changed
from tests.train.fixtures import base, dataset, teacher, text

__all__ = ["base", "dataset", "teacher", "text"]

BOUND = 1.5e-5
STEPS, KD_STEPS = 12, 8
VALUES = ("loss", "ce", "divergence", "grad_norm", "accuracy", "lr", "omega")


class Runs(NamedTuple):
    """What one process, two and four have found, by the name of a run."""

    alone: dict[str, dict[str, Any]]
    ranks: dict[int, list[dict[str, Any]]]
    folder: Path


def everything(config: TrainConfig, selection: Path) -> TrainConfig:
    """Learned residuals, a looped middle, Shampoo on matrices, a teacher on selected data, a head of its own."""
    model = replace(
        config.model, num_layers=3, residual="laurel", laurel=LaurelConfig(rank=4), stack="looped",
        loop=LoopConfig(stages="1x1,1x3,1x1"), tie_head=False, vocab_multiple=64,
    )  # fmt: skip
    data = replace(config.data, selection=str(selection))
    return replace(config, model=model, data=data, optimizer=replace(config.optimizer, name="shampoo"))


def gated(config: TrainConfig) -> TrainConfig:
    """An exit gate over a looped middle, which is trained without a teacher."""
    loop = LoopConfig("1x1,1x3,1x1", injection="add", norm=True, exit_gate=True, exit_beta=0.3)
    model = replace(config.model, num_layers=3, stack="looped", loop=loop)
    return replace(config, model=model, schedule=ScheduleConfig(steps=STEPS), teacher=TeacherConfig())


def adapted(config: TrainConfig, checkpoint: Path) -> TrainConfig:
    """Adapters on the teacher, by LoRA-RITE."""
    tuned = finetune_config(checkpoint, config.data.path, "", rank=2, steps=STEPS, batch_size=8)
    return replace(tuned, run=config.run)


# Sizes that four ranks divide, so that nothing is padded, and two micro-batches.
SIZED: dict[str, dict[str, Any]] = {"sizes of fsdp": FSDP, "sizes of vocab": VOCAB}


def sized(config: TrainConfig, mode: dict[str, Any]) -> TrainConfig:
    return changed(config, model__tie_head=False, model__vocab_multiple=64, data__micro_batch_size=1, **mode)


@pytest.fixture(scope="module")
def salt(base: TrainConfig, teacher: Path) -> TrainConfig:
    short = changed(
        base, data__batch_size=8, model__num_layers=2, run__eval_every=6, run__checkpoint_every=5,
        run__eval_tokens=16 * 27,
    )  # fmt: skip
    schedule = ScheduleConfig(steps=STEPS, mode="salt", omega=0.5, kd_steps=KD_STEPS)
    return replace(short, schedule=schedule, teacher=TeacherConfig(checkpoint=str(teacher), temperature=0.5))


@pytest.fixture(scope="module")
def cached(salt: TrainConfig, teacher: Path, dataset: PackedDataset, tmp_path_factory) -> TrainConfig:
    cache = tmp_path_factory.mktemp("labels") / "cache"
    options = LabelOptions(
        device="cpu", precision="fp32", batch_windows=64, method="topk", k=6, temperature=0.5, seq_len=16
    )
    SoftLabelJob(teacher, dataset.path, options).write(cache)
    return replace(salt, teacher=TeacherConfig(cache=str(cache), temperature=0.5))


@pytest.fixture(scope="module")
def selection(dataset: PackedDataset, tmp_path_factory) -> Path:
    """Every third window."""
    out, pool = tmp_path_factory.mktemp("selection"), Pool([dataset.path], 16)
    kept = np.arange(0, len(pool), 3, dtype=np.int64)
    return finish(out, "selection", {}, pool.inputs, {"kept": kept}, places=pool.places).path


@pytest.fixture(scope="module")
def runs(salt: TrainConfig, cached: TrainConfig, selection: Path, teacher: Path, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    full, full_cached, gate = everything(salt, selection), everything(cached, selection), gated(salt)
    adapters = adapted(salt, teacher)
    halves = {"data__micro_batch_size": 4}
    single = {
        "salt": salt, "halves": changed(salt, **halves), "everything": full, "cached": full_cached, "gate": gate,
        "adapters in halves": changed(adapters, **halves),
    }  # fmt: skip
    alone = {name: worker.run(config, folder / "alone" / name) for name, config in single.items()}
    stop = changed(full, **VOCAB)
    four = {
        "runs": {"everything-hsdp": (full, HSDP), "cached-vocab": (full_cached, VOCAB)},
        "measure": {name: sized(salt, mode) for name, mode in SIZED.items()},
        "stop": stop,
    }
    two = {
        "runs": {
            "salt-ddp": (salt, DDP),
            "salt-fsdp": (changed(salt, distributed__reshard_after_forward=False), FSDP),
            "everything-ddp": (full, DDP),
            "everything-vocab": (changed(full, data__micro_batch_size=2), VOCAB),
            "gate-ddp": (changed(gate, data__micro_batch_size=2), DDP),
            "gate-fsdp": (gate, FSDP),
            "adapters-ddp": (adapters, DDP),
            "resharded": (full, FSDP),
        },
        "full": changed(salt, **FSDP),
        "refuse": changed(salt, **FSDP),
    }
    found = spawn(4, partial(worker.work, plans={4: four, 2: two}, folder=folder))
    ranks = {world: [of[world] for of in found[:world]] for world in (2, 4)}
    alone["resharded"] = worker.run(full, folder / "1" / "resharded")
    return Runs(alone, ranks, folder)


def assert_close(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in wanted]
    for one, other in zip(found, wanted):
        assert one.get("tokens") == other.get("tokens")
        for key in VALUES:
            if key in one:
                assert one[key] == pytest.approx(other[key], rel=BOUND, abs=1e-12), (one["kind"], one["step"], key)


def largest(found: list[dict[str, Any]], wanted: list[dict[str, Any]], key: str) -> float:
    """Largest relative difference of `key` in two curves."""
    pairs = [(a[key], b[key]) for a, b in zip(found, wanted) if key in a]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.parametrize(
    ("world", "name"),
    [
        (2, "salt-ddp"),
        (2, "salt-fsdp"),
        (2, "everything-ddp"),
        (2, "everything-vocab"),
        (2, "gate-ddp"),
        (2, "gate-fsdp"),
        (4, "everything-hsdp"),
        (4, "cached-vocab"),
    ],
)
def test_curves_are_those_of_one_process(runs, world, name):
    found, wanted = [ranks[name] for ranks in runs.ranks[world]], runs.alone[name.partition("-")[0]]
    assert len(found) == world
    for rank in found:
        assert_close(rank["curve"], wanted["curve"])
        assert rank["digest"] == found[0]["digest"]
        assert rank["live"] in (rank["digest"], "")
        assert rank["evals"] == found[0]["evals"]
    assert [e["eval_tokens"] for e in found[0]["evals"]] == [16 * 27] * len(wanted["evals"])
    assert len(wanted["evals"]) >= 3
    one, other = found[0]["curve"], wanted["curve"]
    # The table of docs/distributed.md, with pytest -s.
    print(f"| {world} | {name} | {largest(one, other, 'loss'):.1e} | {largest(one, other, 'grad_norm'):.1e} |")


@pytest.mark.parametrize(("name", "alone"), [("salt-ddp", "halves"), ("adapters-ddp", "adapters in halves")])
def test_two_ranks_have_the_bits_of_two_micro_batches(runs, name, alone):
    """LoRA-RITE is told apart from the rounding of one sum by nothing but this: what of a factor has no gradient yet
    is noise, which it takes at full size."""
    found, wanted = runs.ranks[2][0][name], runs.alone[alone]
    assert found["digest"] == wanted["digest"] == runs.ranks[2][1][name]["digest"]
    # Validation alone is cut in another way.
    steps = [[r for r in log["curve"] if r["kind"] == "train"] for log in (found, wanted)]
    assert [r["grad_norm"] for r in steps[0]] == [r["grad_norm"] for r in steps[1]]
    assert len(steps[0]) == STEPS


def test_one_rank_is_asked_to_stop_and_all_save(runs):
    assert [rank["signum"] for rank in runs.ranks[4]] == [15] * 4
    resumed = runs.folder / "1" / "resharded" / "checkpoints"
    assert (runs.folder / "4" / "resharded" / "checkpoints" / f"step-{STOP:08d}").is_dir()
    # What one process has written since is a whole checkpoint again.
    assert load_newest(resumed).data.get("layout") is None


def test_saved_by_four_and_resumed_by_two_and_by_one(runs):
    """Four ranks with a spread vocabulary, then two without, or one: curves before and after are those of one run."""
    for found in (*(rank["resharded"] for rank in runs.ranks[2]), runs.alone["resharded"]):
        assert_close(found["curve"], runs.alone["everything"]["curve"])


def test_no_room_on_one_rank_leaves_the_checkpoint_before(runs):
    for found in (ranks["full"] for ranks in runs.ranks[2]):
        assert "step-00000004 could not be written" in found["told"]
        assert "the newest one is" in found["told"]
        assert found["left"] == ["step-00000002"]


def test_all_ranks_refuse_together(runs):
    for rank, found in enumerate(ranks["refusals"] for ranks in runs.ranks[2]):
        assert found["config"].startswith("ValueError: the processes of a run must agree, got\n  config data.seed: by")
        assert "\n  effkern: by rank ['" in found["version"]
        assert ".dev0', '" in found["version"]
        assert found["batch"] == "ValueError: data.batch_size must be a multiple of the 2 processes, got 5"
        assert found["replicas"] == "ValueError: distributed.replicas must divide the 2 processes, got 3"
        told = "FileNotFoundError: load_manifest: path must hold" if rank else "RankError: rank 1 stopped: FileNotFound"
        assert found["data"].startswith(told)


@pytest.fixture(scope="module", params=["salt-fsdp", "everything-vocab"])
def stored(request: pytest.FixtureRequest, runs: Runs) -> tuple[Path, Path]:
    """A run directory whose checkpoints two ranks have written in parts, and one with the same weights in one file."""
    parts, whole = runs.folder / "2" / request.param, runs.folder / "whole" / request.param
    loaded = load_model(parts)
    assert read_meta(loaded.path)["layout"] == "sharded"
    meta = {k: v for k, v in loaded.meta.items() if k not in ("format_version", "step", "files", "layout")}
    save_checkpoint(whole / "checkpoints", Checkpoint(loaded.step, {"model": loaded.model.state_dict()}, meta), 1)
    (whole / "tokenizer.json").write_bytes((parts / "tokenizer.json").read_bytes())
    return parts, whole


def test_every_command_takes_a_checkpoint_in_parts(stored, salt, tmp_path, capsys):
    """eval, generate, export, finetune and a student of it have the bits that they have of a whole one."""
    models = [load_model(run).model for run in stored]
    tokens = torch.randint(0, 300, (2, 12))
    assert torch.equal(*(model.logits(model(tokens)) for model in models))

    def told(run: Path, command: str, *arguments: object) -> str:
        assert cli.main([command, "--checkpoint", str(run), "--device", "cpu", *map(str, arguments)]) == 0
        return capsys.readouterr().out.replace(str(run), "RUN")

    made: list[list[object]] = []
    for run in stored:
        work = tmp_path / run.parent.name
        numbers = told(run, "eval", "--data", salt.data.path, "--max-tokens", 64, "--json")
        text = told(run, "generate", "--prompt", "alpha", "--max-new-tokens", 6)
        assert cli.main(["export", "--checkpoint", str(run), "--out", str(work / "exported")]) == 0
        tune = ["--data", salt.data.path, "--out", work / "tuned", "--rank", 1, "--steps", 2, "--precision", "fp32"]
        told(run, "finetune", *tune)
        student = changed(salt, teacher__checkpoint=str(run), schedule__steps=2, schedule__kd_steps=2)
        taught = worker.run(student, work / "student")
        exported = (work / "exported" / "model.safetensors").read_bytes()
        tuned = weights_digest(load_model(work / "tuned" / "merged").model)
        made.append([numbers, text, exported, tuned, taught["curve"], taught["digest"]])
    assert made[0] == made[1]
    assert '"loss": ' in made[0][0]


@pytest.mark.parametrize("name", SIZED)
def test_what_is_sent_and_held_is_what_the_estimate_says(runs, salt, teacher, name):
    config = sized(salt, SIZED[name])
    guide = load_model(teacher).model.config
    numbers = estimate_ranks(config, torch.float32, Cluster.of(4), guide)
    sent = numbers.sent
    for found in (rank[name] for rank in runs.ranks[4]):
        assert found["weights"] == numbers.memory["weights"]
        assert found["optimizer"] == numbers.memory["optimizer"]
        gathered = sent["gather of weights"] + sent["gather of the teacher"]
        if name == "sizes of fsdp":
            assert found["gather"] == gathered
            assert found["scatter"] == sent["scatter of gradients"]
            assert found["all-reduce"] == 0
        else:
            # What of hidden states is not gathered is scattered: the gradient of the student's.
            back = sent["hidden states"] * 4 * 16 / (4 * (16 + 16 + 8) + 8)
            assert found["gather"] == pytest.approx(gathered + sent["hidden states"] - back)
            assert found["scatter"] == pytest.approx(sent["scatter of gradients"] + back)
            # 68 bytes a token at temperature 1.
            assert found["all-reduce"] == pytest.approx(sent["statistics of the loss"] * 68 / 72)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distributed__mode": "ddp"}, r"distributed.mode='ddp' must be started by torchrun, got no RANK"),
        ({"distributed__replicas": 2}, r"distributed.replicas must be 1 for mode='none', got 2"),
        ({"distributed__vocab_parallel": True}, r"distributed.vocab_parallel must be False for mode='none', got True"),
        (VOCAB, r"distributed.vocab_parallel must be False where model.tie_head=True, got True"),
        (
            {
                **VOCAB,
                "model__tie_head": False,
                "model__stack": "looped",
                "model__loop": {"stages": "1x2", "exit_gate": True},
            },
            r"distributed.vocab_parallel must be False where model.loop.exit_gate=True, got True",
        ),
    ],
)
def test_settings_that_do_not_fit(base, monkeypatch, tmp_path, changes, message):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=message):
        Trainer(changed(base, run__out=str(tmp_path), **changes), quiet=True)


def test_torchrun_without_a_mode_is_refused(base, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"distributed.mode must be ddp, fsdp or hsdp for 2 processes, got 'none'"):
        Trainer(changed(base, run__out=str(tmp_path)), quiet=True)
