"""The estimate of a step on several GPUs; what ranks really send and hold: tests/distributed/test_train.py."""

from dataclasses import replace

import pytest
import torch

from effkern import cli
from effkern.models import count_parameters
from effkern.train.config import DistributedConfig, OptimizerConfig
from effkern.train.estimate import estimate
from effkern.train.estimate_ranks import Cluster, estimate_ranks, render_ranks
from effkern.train.presets import PRESETS

PAPER = PRESETS["paper-2.8b"].config
TEACHER = PRESETS["paper-1.5b"].config.model
WEIGHTS, TABLE = count_parameters(PAPER.model), PAPER.model.padded_vocab * PAPER.model.hidden_size


def shared(config, mode, **settings):
    return replace(config, distributed=DistributedConfig(mode=mode, **settings))


@pytest.mark.parametrize("name", ["demo", "small", "paper-2.8b"])
def test_one_gpu_has_what_the_dry_run_says(name):
    config, guide = PRESETS[name].config, PRESETS[PRESETS[name].teacher].config.model
    cluster = Cluster.of(1)
    numbers = estimate_ranks(config, torch.bfloat16, cluster, guide)
    whole = estimate(config, torch.bfloat16, guide, cluster.kind.chunk_bytes)
    assert numbers.peak == whole.memory
    assert numbers.sent == {}
    assert numbers.flops * config.schedule.steps == pytest.approx(whole.student_flops)
    assert numbers.step_s(teacher=True)[0] == numbers.step_s(teacher=True)[1]


def test_ddp_sends_every_gradient_twice_and_cuts_no_memory():
    numbers = estimate_ranks(shared(PAPER, "ddp"), torch.bfloat16, Cluster.of(8), TEACHER)
    assert numbers.sent == {"all-reduce of gradients": 2 * 4 * WEIGHTS * 7 / 8}
    assert numbers.memory["optimizer"] == 8 * WEIGHTS
    assert numbers.communication_s == pytest.approx(2 * 4 * WEIGHTS * 7 / 8 / (0.8 * 450e9))


def test_fsdp_and_its_variants():
    cluster = Cluster.of(64)
    plain = estimate_ranks(shared(PAPER, "fsdp"), torch.bfloat16, cluster, TEACHER)
    assert plain.memory["weights"] == 4 * WEIGHTS / 64
    # 2048 rows over 64 ranks in micro-batches of 8: four gathers forward and four backward, of all but the root.
    root = TABLE + PAPER.model.hidden_size
    assert plain.sent["gather of weights"] == 4 * 4 * (2 * (WEIGHTS - root) + root) * 63 / 64
    assert plain.sent["scatter of gradients"] == 4 * WEIGHTS * 63 / 64
    kept = estimate_ranks(shared(PAPER, "fsdp", reshard_after_forward=False), torch.bfloat16, cluster, TEACHER)
    assert kept.sent["gather of weights"] == 4 * 4 * WEIGHTS * 63 / 64
    assert kept.memory["gathered"] > plain.memory["gathered"]
    copies = estimate_ranks(shared(PAPER, "hsdp", replicas=8), torch.bfloat16, cluster, TEACHER)
    assert copies.sent["all-reduce of gradients"] == 2 * 4 * WEIGHTS / 8 * 7 / 8
    assert copies.communication_s < plain.communication_s
    untied = replace(PAPER, model=replace(PAPER.model, tie_head=False))
    whole = estimate_ranks(shared(untied, "fsdp"), torch.bfloat16, cluster, TEACHER)
    spread = estimate_ranks(shared(untied, "fsdp", vocab_parallel=True), torch.bfloat16, cluster, TEACHER)
    assert whole.sent["gather of weights"] - spread.sent["gather of weights"] == 4 * 4 * TABLE * 63 / 64
    assert whole.memory["gathered"] - spread.memory["gathered"] == 2 * 4 * TABLE


def test_shampoos_factors_are_whole_on_every_rank():
    config = replace(PRESETS["small"].config, optimizer=OptimizerConfig(name="shampoo"))
    one = estimate_ranks(config, torch.bfloat16, Cluster.of(1)).memory["optimizer"]
    eight = estimate_ranks(shared(config, "fsdp"), torch.bfloat16, Cluster.of(8)).memory["optimizer"]
    assert one == estimate(config, torch.bfloat16).optimizer
    factors = (8 * eight - one) / 7
    assert 0 < factors < one


def test_what_does_not_fit_is_said():
    cluster = Cluster.of(8, "a100-40")
    config = shared(PAPER, "ddp")
    text = render_ranks(estimate_ranks(config, torch.bfloat16, cluster, TEACHER), config, cluster, torch.bfloat16)
    assert "DOES NOT FIT" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "3"], "distributed.mode must be ddp, fsdp or hsdp for --gpus 3, got 'none'"),
        (["--gpus", "3", "--mode", "ddp"], "data.batch_size must be a multiple of --gpus 3, got 16"),
        (["--gpus", "0"], "--gpus must be positive, got 0"),
        (["--gpu", "abacus"], "ceilings: device must be one of h100"),
        (["--precision", "fp8"], "--precision must be bf16 or fp32, got 'fp8'"),
        (["--set", "data.batch_size=x"], "--set must be section.field=VALUE with a TOML value"),
        (["--gpus", "4", "--set", "distributed.mode='hsdp'", "distributed.replicas=3"], "must divide --gpus 4, got 3"),
    ],
)
def test_bad_input(capsys, arguments, message):
    assert cli.main(["estimate", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_command_prints_memory_traffic_time_and_formulas(capsys):
    assert cli.main(["estimate", "--preset", "paper-2.8b", "--gpus", "64", "--mode", "fsdp"]) == 0
    printed = capsys.readouterr().out
    assert "64 x H100 SXM, 8 a node; fsdp: 1 x 64 slices" in printed
    for part in ("memory a GPU", "sent a GPU and step", "step with teacher", "step without", "ddp: all-reduce of 4 W"):
        assert part in printed
