"""effkern data dedup ... report on a small corpus: what each step leaves, replays, stops, and errors of one line."""

import os
import random
import signal

import numpy as np
import pytest
import torch

from effkern import cli
from effkern.data import PackedDataset
from effkern.data.curation import Embedder, Pool, open_artifact, steps
from effkern.data.curation.artifact import begin
from effkern.data.curation.mix import mixture
from effkern.data.curation.passes import Stopped
from effkern.data.curation.salt_ds import salt_ds_score
from effkern.data.folder import build_folder
from effkern.ops.token_stats.reference import token_stats
from effkern.train.restore import load_model
from tests.test_cli import SMALL, fails

pytest.importorskip("rensa")

CODE = ["return", "value", "def", "self", "None", "list", "import", "class", "if", "else"]
VERSE = ["thou", "night", "summer", "heart", "golden", "eyes", "love", "sweet", "time", "rose"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two packed sources, one of them with planted near-copies, a trained model, and every step up to the page."""
    root = tmp_path_factory.mktemp("curation")
    rng = random.Random(0)
    for name, words in (("code", CODE), ("verse", VERSE)):
        (root / name).mkdir()
        for i in range(24):
            text = rng.choices(words, k=160)
            (root / name / f"{i:02d}.txt").write_text(" ".join(text))
            if i < 6 and name == "code":
                (root / name / f"{i:02d}-copy.txt").write_text(" ".join([*text[:-1], "changed"]))
                (root / name / f"{i:02d}-same.txt").write_text(" ".join(text))

    def run(*words: object) -> None:
        assert cli.main(["data", *map(str, words)]) == 0

    for name in ("code", "verse"):
        run("dedup", "--out", root / f"{name}.dedup", "--sources", root / name, "--workers", 0)
    kept = root / "code.dedup" / "kept.jsonl"
    run("build", "--out", root / "A", "--sources", kept, "--vocab-size", 300, "--val-fraction", 0.2)
    run("build", "--out", root / "B", "--sources", root / "verse.dedup" / "kept.jsonl", "--tokenizer",
        root / "A" / "tokenizer.json", "--val-fraction", 0.2)  # fmt: skip
    (root / "run.toml").write_text(SMALL.format(data=root / "A", out=root / "run").replace("steps = 8", "steps = 40"))
    assert cli.main(["train", "--config", str(root / "run.toml")]) == 0
    common = ("--data", root / "A", root / "B", "--checkpoint", root / "run", "--device", "cpu")
    for kind in ("token", "output"):
        run("embed", "--out", root / kind, *common, "--kind", kind, "--components", 8)
    run("score", "--out", root / "scores", *common)
    run("cluster", "--out", root / "balanced", "--embeddings", root / "token", "--method", "balanced", "--size", 10,
        "--scores", root / "scores", "--device", "cpu")  # fmt: skip
    run("cluster", "--out", root / "tree", "--embeddings", root / "output", "--device", "cpu")
    run("select", "--out", root / "diverse", "--step", root / "tree", "--budget", 40)
    run("select", "--out", root / "hard", "--step", root / "scores", "--budget", 30, "--method", "salt-ds")
    run("select", "--out", root / "drawn", "--step", root / "token", "--budget", 30, "--method", "random")
    run("mix", "--out", root / "mixed", "--selection", root / "diverse", "--windows", 30, "--alpha", 0.5)
    run("report", "--out", root / "page.html", "--steps", *(root / s for s in ("code.dedup", "diverse", "hard")))
    return root


@pytest.fixture(scope="module")
def pool(folder):
    return Pool([folder / "A", folder / "B"], 16)


def test_dedup_leaves_one_of_each(folder):
    found = open_artifact(folder / "code.dedup", "dedup")
    assert found.results["documents"] == {"kept": 24, "exact duplicate": 6, "near-duplicate": 6}
    assert PackedDataset(folder / "A").manifest.sources[0].duplicates == 0


def test_embeddings_are_those_of_the_model(folder, pool):
    model = load_model(folder / "run").model
    for kind in ("token", "output"):
        found = open_artifact(folder / kind, "embeddings")
        mean, scale, components = (found.load(name) for name in ("mean", "scale", "components"))
        raw = Embedder(model, pool, kind).raw(np.arange(len(pool)))
        truth = ((raw - mean) / scale) @ components.T
        truth /= np.linalg.norm(truth, axis=1, keepdims=True)
        np.testing.assert_allclose(found.load("embeddings"), truth, atol=2e-5)


def test_scores_are_those_of_the_model(folder, pool):
    model = load_model(folder / "run").model
    tokens = torch.from_numpy(pool.tokens(np.arange(len(pool)), 1))
    with torch.no_grad():
        hidden = model(tokens[:, :-1]).flatten(0, 1)
    loss, _, _, rank = token_stats(hidden.double(), model.head_weight.double(), tokens[:, 1:].flatten())
    loss, rank = loss.view(len(pool), -1).numpy(), rank.view(len(pool), -1).numpy()
    found = open_artifact(folder / "scores", "scores")
    np.testing.assert_allclose(found.load("loss"), loss.mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.load("score"), salt_ds_score(loss, rank), atol=1e-4)


def test_clusters_beat_a_partition_by_lot(folder):
    """The proxy was trained on one of the sources: losses differ by source, and so do the embeddings."""
    results = open_artifact(folder / "balanced", "clusters").results
    assert results["scores"]["variance_reduction"] > 2 * results["random_partition"]["variance_reduction"]
    assert results["scores"]["purity"] > results["random_partition"]["purity"] + 0.1
    assert results["smallest"] >= 2
    assert results["largest"] <= 50


def test_selections_say_why(folder, pool):
    for name, budget in (("diverse", 40), ("hard", 30), ("drawn", 30)):
        found = open_artifact(folder / name, "selection")
        assert found.load("kept").size == budget
        assert sum(found.results["reasons"].values()) == len(pool) == found.results["of"]
        assert sum(row["kept"] for row in found.results["by_source"].values()) == budget
    scores = open_artifact(folder / "scores").load("score")
    kept = open_artifact(folder / "hard").load("kept")
    assert scores[kept].min() >= np.delete(scores, kept).max()


def test_a_selection_is_replayed(folder, tmp_path, capsys):
    for name in ("diverse", "hard", "drawn"):
        assert cli.main(["data", "select", "--replay", str(folder / name), "--out", str(tmp_path / name)]) == 0
        found, again = open_artifact(folder / name), open_artifact(tmp_path / name)
        assert found.hash == again.hash
        assert (folder / name / "kept.npy").read_bytes() == (tmp_path / name / "kept.npy").read_bytes()
    # Another step where the old one was.
    broken = tmp_path / "broken"
    broken.mkdir()
    text = (folder / "hard" / "curation.json").read_text()
    for file in (folder / "hard").glob("*.npy"):
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "curation.json").write_text(text.replace(str(folder / "scores"), str(folder / "token")))
    message = fails(capsys, ["data", "select", "--replay", str(broken), "--out", str(tmp_path / "no")])
    assert "step must be the step that it was made from" in message


def test_a_mixture_is_a_dataset_of_the_chosen_windows(folder, pool):
    dataset = PackedDataset(folder / "mixed", verify=True)
    settings = dataset.manifest.settings
    kept = open_artifact(folder / "diverse").load("kept")
    sizes = [int((pool.source(kept) == i).sum()) for i in range(2)]
    assert sum(settings["counts"]) == 30
    assert settings["counts"] == mixture(sizes, 30, alpha=0.5)
    windows = dataset.windows("train", np.arange(30) * 16, 16)
    chosen = {tuple(row) for row in pool.tokens(kept).tolist()}
    assert all(tuple(row) in chosen for row in windows.tolist())
    assert dataset.num_tokens("train") == 30 * 16 + 1
    rows = dataset.read("val").reshape(-1, 16).tolist()
    truth = [d.read("val")[: d.num_tokens("val") // 16 * 16].reshape(-1, 16).tolist() for d in pool.datasets]
    assert sorted(rows) == sorted([*truth[0], *truth[1]])
    # A prefix is a fair sample: the first half holds about half of each source's windows.
    for part in truth:
        assert sum(row in part for row in rows[: len(rows) // 2]) == pytest.approx(len(part) / 2, rel=0.3), len(part)
    config = SMALL.format(data=folder / "mixed", out=folder / "run2")
    (folder / "run2.toml").write_text(config.replace("steps = 8", "steps = 2"))
    assert cli.main(["train", "--config", str(folder / "run2.toml")]) == 0


def test_the_page_says_what_was_kept(folder):
    page = (folder / "page.html").read_text()
    for name in ("code.dedup", "diverse", "hard"):
        assert open_artifact(folder / name).hash in page
    assert "another of its cluster is closer to the mean" in page
    assert "its score is too low" in page
    assert "near-duplicate of" in page
    assert "http" not in page
    assert "<script" not in page


def test_a_stopped_pass_goes_on(folder, pool, tmp_path, monkeypatch):
    """Parts that are there are not computed again; the result has the hash of one go."""
    monkeypatch.setattr(steps, "PART", 20)
    monkeypatch.setattr(steps, "BATCH", 10)
    loaded = load_model(folder / "run")
    asked = iter([False] * 5 + [True])
    with pytest.raises(Stopped, match="stopped after 40 of"):
        steps.score(loaded.model, loaded.weights_hash, pool, tmp_path / "s", stop=lambda: next(asked))
    seen: list[int] = []
    plain = steps.Scorer.__call__
    monkeypatch.setattr(steps.Scorer, "__call__", lambda self, rows: seen.extend(rows.tolist()) or plain(self, rows))
    steps.score(loaded.model, loaded.weights_hash, pool, tmp_path / "s")
    assert seen == list(range(40, len(pool)))
    whole = steps.score(loaded.model, loaded.weights_hash, pool, tmp_path / "whole")
    assert open_artifact(tmp_path / "s").hash == whole.hash
    # An unfinished step of other settings is not mixed in.
    asked = iter([False] * 3 + [True])
    with pytest.raises(Stopped):
        steps.score(loaded.model, loaded.weights_hash, pool, tmp_path / "t", stop=lambda: next(asked))
    with pytest.raises(ValueError, match="unfinished step with other settings or inputs"):
        steps.score(loaded.model, loaded.weights_hash, pool, tmp_path / "t", k=3)
    assert steps.score(loaded.model, loaded.weights_hash, pool, tmp_path / "t", k=3, overwrite=True).hash != whole.hash


def test_a_signal_stops_and_the_same_command_goes_on(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "PART", 20)
    monkeypatch.setattr(steps, "BATCH", 10)
    command = ["data", "score", "--data", str(folder / "A"), "--checkpoint", str(folder / "run"), "--device", "cpu"]
    command += ["--out", str(tmp_path / "s")]
    plain, calls = steps.Scorer.__call__, []

    def interrupted(self, rows):
        calls.append(len(rows))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, rows)

    monkeypatch.setattr(steps.Scorer, "__call__", interrupted)
    assert cli.main(command) == 128 + signal.SIGTERM
    assert "finished parts are kept, the same command goes on" in capsys.readouterr().out
    assert (tmp_path / "s" / ".part-000000.npy").exists()
    assert cli.main(command) == 0
    found = open_artifact(tmp_path / "s", "scores")
    assert [file.name for file in (tmp_path / "s").glob(".*")] == [".lock"]
    assert found.load("loss").size == len(Pool([folder / "A"], 16))


def test_two_commands_do_not_write_to_one_folder(folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        "data",
        "select",
        "--step",
        str(folder / "token"),
        "--budget",
        "30",
        "--method",
        "random",
        "--out",
        str(out),
    ]
    with begin(out, "selection", {}, {}, False):
        assert f"selection: another process is writing to {out} (process {os.getpid()} on " in fails(capsys, words)
    assert cli.main(words) == 0
    with build_folder(tmp_path / "set", False):
        words = ["data", "build", "--out", str(tmp_path / "set"), "--sources", str(folder / "code")]
        assert f"another build is writing to {tmp_path / 'set'} (process {os.getpid()} on " in fails(capsys, words)


def test_errors_are_one_line(folder, tmp_path, capsys):
    a, run = str(folder / "A"), str(folder / "run")
    out = str(tmp_path / "out")
    for words, message in (
        (["select", "--step", str(folder / "tree"), "--budget", "100000"], "budget must lie in [1, "),
        (["select", "--step", str(folder / "scores"), "--budget", "5"], "step must be clusters of method=diameter"),
        (["select", "--step", str(folder / "balanced"), "--budget", "5"], "step must be clusters of method=diameter"),
        (["select", "--step", str(folder / "tree"), "--budget", "5", "--method", "salt-ds"], "step must be scores"),
        (["select", "--budget", "5"], "one of step and replay must be given"),
        (["embed", "--data", a, "--checkpoint", run, "--components", "99"], "components must lie in [1, 16]"),
        (["embed", "--data", a, "--checkpoint", run, "--kind=output", "--seq-len", "128"], "seq_len must be at most"),
        (["embed", "--data", str(tmp_path), "--checkpoint", run], "path must hold a manifest.json"),
        (["score", "--data", a, "--checkpoint", run, "--k", "0"], "k must be at least 1, got 0"),
        (["cluster", "--embeddings", str(folder / "scores")], "must be a step of kind embeddings, got scores"),
        (["cluster", "--embeddings", str(folder / "token"), "--method", "balanced", "--size", "0"], "size must lie in"),
        (["cluster", "--embeddings", str(folder / "token"), "--neighbors", "64"], "neighbors must lie in [1, 63]"),
        (["mix", "--windows", "3"], "one of selection and data must be given"),
        (["mix", "--windows", "3", "--data", a], "seq_len must be at least 1 with data"),
        (["mix", "--windows", "31", "--selection", str(folder / "hard")], "windows must lie in [1, 30]"),
        (["dedup", "--sources", str(tmp_path / "none")], "sources: must be"),
        (["report", "--steps", str(tmp_path)], "path must hold a finished step"),
    ):  # fmt: skip
        assert message in fails(capsys, ["data", *words, "--out", out]), words


def test_a_step_is_not_written_over_what_it_reads(folder, capsys):
    for name, words in (("tree", ["select", "--step"]), ("token", ["cluster", "--embeddings"])):
        before = open_artifact(folder / name).hash
        words = ["data", *words, str(folder / name), "--out", str(folder / name), "--overwrite"]
        words += ["--budget", "5"] if name == "tree" else []
        assert "out must be another folder" in fails(capsys, words)
        assert open_artifact(folder / name).hash == before


def test_a_failed_step_leaves_no_manifest(folder, tmp_path, capsys):
    """Nothing that looks finished stands where a step failed."""
    fails(capsys, ["data", "cluster", "--embeddings", str(folder / "token"), "--method", "balanced", "--size", "0",
                   "--out", str(tmp_path / "c")])  # fmt: skip
    assert not (tmp_path / "c" / "curation.json").exists()
