"""Runs whose first steps draw from a selection (SALT_DS): the order itself, resume, refusals."""

from dataclasses import replace

import numpy as np
import pytest

from effkern.data import BatchOrder
from effkern.data.curation.artifact import finish
from effkern.data.curation.pool import Pool
from effkern.data.curation.selected_order import SelectedOrder
from effkern.train.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from effkern.train.config import TeacherConfig
from effkern.train.loop import Trainer
from tests.train.fixtures import at

LENGTH, ROWS, UNTIL = 16, 4, 5


@pytest.fixture(scope="module")
def kept():
    return np.array([3, 8, 9, 20, 21, 40, 77], np.int64)


@pytest.fixture
def selection(dataset, kept, tmp_path):
    return make(dataset, kept, tmp_path / "selection")


def make(dataset, kept, path, seq_len=LENGTH, paths=None):
    pool = Pool(paths or [dataset.path], seq_len)
    path.mkdir()
    return finish(path, "selection", {}, pool.inputs, {"kept": kept}, places=pool.places)


def orders(dataset, selection, **options):
    sizes = {"seq_len": LENGTH, "batch_size": ROWS, "seed": 3, **options}
    return SelectedOrder(dataset, selection=selection, until=UNTIL, **sizes), BatchOrder(dataset, **sizes)


def test_first_steps_go_through_the_selection_and_later_ones_are_unchanged(dataset, selection, kept):
    order, plain = orders(dataset, selection.path)
    drawn = np.concatenate([order.indices(step) for step in range(UNTIL)])
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == kept.tolist()
    assert drawn[:7].tolist() != drawn[7:14].tolist()
    for step in (UNTIL, UNTIL + 9):
        np.testing.assert_array_equal(order.batch(step), plain.batch(step))
    np.testing.assert_array_equal(order.batch(0), dataset.windows("train", drawn[:4] * LENGTH, LENGTH + 1))


def test_ranks_share_a_batch(dataset, selection):
    parts = [orders(dataset, selection, rank=rank, world_size=2)[0] for rank in range(2)]
    for step in (0, UNTIL - 1, UNTIL):
        whole = orders(dataset, selection)[0].indices(step)
        np.testing.assert_array_equal(np.concatenate([part.indices(step) for part in parts]), whole)


def test_refusals(dataset, kept, tmp_path, selection):
    with pytest.raises(ValueError, match=r"selection must be made from .* alone, split 'train', seq_len 16, got"):
        orders(dataset, make(dataset, kept, tmp_path / "length", seq_len=8))
    with pytest.raises(ValueError, match="selection must be made from"):
        orders(dataset, make(dataset, kept, tmp_path / "two", paths=[dataset.path] * 2))
    with pytest.raises(ValueError, match="selection must keep a batch of 4 windows, got 3"):
        orders(dataset, make(dataset, kept[:3], tmp_path / "few"))
    with pytest.raises(FileNotFoundError, match="must hold a finished step"):
        orders(dataset, tmp_path / "nothing")
    np.save(selection.path / "kept.npy", kept + 1)
    with pytest.raises(ValueError, match=r"file was changed .*kept\.npy"):
        orders(dataset, selection.path)


def final(trainer):
    return load_checkpoint(list_checkpoints(trainer.out / "checkpoints")[-1]).tensors["model"]


def test_run_trains_on_it_and_resumes_bit_for_bit(salt, selection, tmp_path, monkeypatch):
    config = at(salt, tmp_path / "run", data__selection=str(selection.path))
    seen = []
    whole = Trainer(config, quiet=True)
    batch = whole.order.batch
    monkeypatch.setattr(whole.order, "batch", lambda step: seen.append(step) or batch(step))
    whole.run()
    assert whole.order.until == config.schedule.kd_steps
    assert seen == list(range(20))
    assert whole.inputs.selection == selection.hash
    # Steps 7 to 20 again, from what a run that was stopped leaves.
    again = replace(config, run=replace(config.run, out=str(tmp_path / "again")))
    Trainer(replace(again, run=replace(again.run, keep_last=9)), quiet=True).run()
    checkpoints = list_checkpoints(tmp_path / "again" / "checkpoints")
    assert checkpoints[0].name == "step-00000007"
    for path in checkpoints[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    resumed = Trainer(again, quiet=True)
    resumed.run()
    other = final(resumed)
    assert all((value == other[name]).all() for name, value in final(whole).items())


def test_without_a_teacher_all_steps_draw_from_it(base, selection, tmp_path):
    trainer = Trainer(at(base, tmp_path, data__selection=str(selection.path)), quiet=True)
    assert trainer.order.until == base.schedule.steps


def test_another_selection_is_another_run(salt, dataset, selection, kept, tmp_path):
    config = at(salt, tmp_path / "run", data__selection=str(selection.path), schedule__steps=10)
    Trainer(config, quiet=True).run()
    other = make(dataset, kept + 1, tmp_path / "other")
    for path in (str(other.path), ""):
        changed = replace(config, data=replace(config.data, selection=path))
        with pytest.raises(CheckpointError, match=r"selection \(hash\)"):
            Trainer(changed, quiet=True).run()


def test_cached_labels_must_hold_the_selected_windows(salt, teacher, dataset, selection, tmp_path):
    from effkern.train.soft_labels import LabelOptions, SoftLabelJob

    options = LabelOptions(steps=10, batch_size=4, order_seed=0, method="topk", k=8)
    SoftLabelJob(teacher, dataset.path, replace(options, seq_len=16, temperature=0.5)).write(tmp_path / "labels")
    cached = TeacherConfig(cache=str(tmp_path / "labels"), temperature=0.5)
    config = replace(at(salt, tmp_path / "run", data__selection=str(selection.path)), teacher=cached)
    with pytest.raises(ValueError, match=r"teacher\.cache must hold labels for steps 0 to 9"):
        Trainer(config, quiet=True).run()
