"""The benchmarks of whole optimizer steps: their floor, their memory, and malloc as a training process has it."""

import argparse
import sys

import pytest
import torch

from benchmarks import lora_rite_step, runner, shampoo_step

SMALL = argparse.Namespace(width=16, layers=1, vocabulary=32, threads=1, rounds=1)


def test_the_floor_of_gram_is_half_of_a_product(monkeypatch):
    called = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out=None: called.append((a, b)) or real(a, b, out=out))
    parts = shampoo_step.floor_parts(SMALL)
    called.clear()
    parts["floor: Gram"]()
    # Six matrices, each with its own transpose, to a 16 x 16 product.
    assert [(a.shape[0], b.shape[1]) for a, b in called] == [(16, 16)] * 6
    assert all(a.data_ptr() == b.data_ptr() for a, b in called)
    ones = {name: runner.Timing(1.0, 1.0, 1.0, 1.0) for name in [*parts, "ours, roots every 10 steps"]}
    monkeypatch.setattr(shampoo_step, "variants", lambda a: ({}, {}))
    monkeypatch.setattr(shampoo_step.runner, "interleave", lambda *_, **__: dict(ones))
    timings, _ = shampoo_step.measure(SMALL)
    assert (timings["floor: Gram"].wall, timings["floor"].wall) == (0.5, 3.5)
    assert timings["floor / 10"].cpu == pytest.approx(2.6)


def test_peaks_are_of_the_same_sizes_and_parameters(monkeypatch):
    asked = []
    monkeypatch.setattr(runner, "in_fresh_process", lambda module, *words: asked.append(words) or str(1 << 20))
    assert shampoo_step.peak(SMALL) == {"ours, roots every step": 1.0, "torch Muon": 1.0}
    assert {"--vocabulary=32", "--width=16", "--layers=1", "--threads=1"} <= set(asked[0]) & set(asked[1])
    moved = []
    real = shampoo_step.parameters

    def parameters(a):
        found = real(a)
        moved.append((found[1], found[1].detach().clone()))
        return found

    monkeypatch.setattr(shampoo_step, "parameters", parameters)
    for name in ("ours", "muon"):
        shampoo_step.prepared(argparse.Namespace(**{**vars(SMALL), "peak": name}))()
        table, before = moved[-1]
        assert not torch.equal(table, before)


def test_malloc_keeps_memory_while_steps_are_timed(monkeypatch):
    called = []
    monkeypatch.setattr(runner, "keep_memory", lambda: called.append("keep"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(lora_rite_step, "time_and_state", lambda *_, **__: called.append("time") or [])
    assert lora_rite_step.main(["--parts", "time"]) == 0
    assert called == ["keep", "time", "time"]
    called.clear()
    monkeypatch.setattr(shampoo_step, "check", lambda a: None)
    monkeypatch.setattr(shampoo_step, "measure", lambda a: called.append("time") or ({}, {}))
    monkeypatch.setattr(shampoo_step, "peak", lambda a: {})
    monkeypatch.setattr(shampoo_step, "table", lambda *_: "")
    monkeypatch.setattr(sys, "argv", ["shampoo_step"])
    shampoo_step.main()
    assert called == ["keep", "time"]
    # A peak is taken with malloc as in_fresh_process sets it.
    called.clear()
    monkeypatch.setattr(runner, "peak_memory", lambda _: called.append("peak"))
    monkeypatch.setattr(sys, "argv", ["shampoo_step", "--peak=ours"])
    shampoo_step.main()
    assert called == ["peak"]
