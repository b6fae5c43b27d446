"""The trainer in two and four processes equals the trainer in one, up to the order of sums in float32.

Every rank computes its rows of the same batches, so nothing differs but where sums over tokens are cut: each partial
sum is off by some 2^-24 of its size, in gradients and in losses. BOUND, relative, is 250 times that for 12 steps of
AdamW and Shampoo; measured: up to 2e-6 (the norm of the gradient; the loss: 2e-7). Two ranks even give the very bits of
one process that accumulates two micro-batches, as (a + b) / 2 is exact.
"""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

# ruff: noqa: E402
# On a bare GPU machine, without what the trainer needs, there is nothing to collect.
NEEDED = ("numpy", "tokenizers", "safetensors", "rich")
if not all(find_spec(name) for name in NEEDED):
    pytest.skip(f"needs {NEEDED}", allow_module_level=True)

from effkern.data import PackedDataset
from effkern.models import LaurelConfig
from effkern.models.loop_config import LoopConfig
from effkern.train.checkpoint import load_newest
from effkern.train.config import ScheduleConfig, TeacherConfig, TrainConfig
from effkern.train.estimate_ranks import Cluster, estimate_ranks
from effkern.train.loop import Trainer
from effkern.train.restore import load_model
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


def everything(config: TrainConfig) -> TrainConfig:
    """Learned residuals, a looped middle, Shampoo on matrices, a teacher, an output layer of its own."""
    model = replace(
        config.model, num_layers=3, residual="laurel", laurel=LaurelConfig(rank=4), stack="looped",
        loop=LoopConfig(stages="1x1,1x3,1x1"), tie_head=False, vocab_multiple=64,
    )  # fmt: skip
    return replace(config, model=model, optimizer=replace(config.optimizer, name="shampoo"))


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
        device="cpu", precision="fp32", batch_windows=8, method="topk", k=6, temperature=0.5, steps=KD_STEPS,
        batch_size=8,
    )  # fmt: skip
    SoftLabelJob(teacher, dataset.path, options).write(cache)
    return replace(salt, teacher=TeacherConfig(cache=str(cache), temperature=0.5))


@pytest.fixture(scope="module")
def runs(salt: TrainConfig, cached: TrainConfig, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    full, full_cached = everything(salt), everything(cached)
    single = {
        "salt": salt, "halves": changed(salt, data__micro_batch_size=4), "everything": full, "cached": full_cached,
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
        assert rank["evals"] == found[0]["evals"]
    assert [e["eval_tokens"] for e in found[0]["evals"]] == [16 * 27] * 4
    one, other = found[0]["curve"], wanted["curve"]
    # The table of docs/distributed.md, with pytest -s.
    print(f"| {world} | {name} | {largest(one, other, 'loss'):.1e} | {largest(one, other, 'grad_norm'):.1e} |")


def test_two_ranks_have_the_bits_of_two_micro_batches(runs):
    found, wanted = runs.ranks[2][0]["salt-ddp"], runs.alone["halves"]
    assert found["digest"] == wanted["digest"]
    # Validation alone is cut in another way.
    steps = [[r for r in log["curve"] if r["kind"] == "train"] for log in (found, wanted)]
    assert [r["grad_norm"] for r in steps[0]] == [r["grad_norm"] for r in steps[1]]


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
        told = "FileNotFoundError: load_manifest: path must hold" if rank else "RankError: rank 1 stopped: FileNotFound"
        assert found["data"].startswith(told)


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
