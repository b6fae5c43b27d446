"""The scripts under examples run, in this process, with few steps; what they print says that they did their work."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = {path.stem for path in FOLDER.glob("*.py")} - {"corpus"}


@pytest.fixture
def run(monkeypatch, capsys):
    """What a script prints, line by line."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setitem(sys.modules, "corpus", None)
    del sys.modules["corpus"]

    def run(name, *argv):
        # The corpus takes a second to collect; a tenth of it does.
        import corpus

        corpus.SIZE = 60_000
        assert runpy.run_path(str(FOLDER / f"{name}.py"))["main"](list(argv)) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line]

    return run


def numbers(line):
    return [float(x.replace(",", "")) for x in re.findall(r"\d[\d,]*\.\d+|\d[\d,]+", line)]


def test_every_script_is_run_here():
    assert {"distil", "laurel_llama", "loop_qwen", "one_sided_shampoo", "lora_rite", "cached_soft_labels"} == SCRIPTS
    for name in SCRIPTS:
        assert f'run("{name}"' in Path(__file__).read_text(), name


def test_distil(run):
    teacher, taught, alone = (numbers(line)[0] for line in run("distil", "--steps", "4"))
    assert max(teacher, taught, alone) < 5.6
    assert taught != alone


def test_laurel_llama(run):
    put_in, trained, added = map(numbers, run("laurel_llama", "--steps", "4"))
    # Put in, it changes nothing; trained on, it does.
    assert put_in[0] == pytest.approx(put_in[1], abs=2e-4)
    assert trained[0] != trained[1]
    assert added[0] == 4 * 2 * (2 + 2 * 8 * 64)


def test_loop_qwen(run):
    plain, looped, deep, text = run("loop_qwen", "--steps", "3")
    assert numbers(plain)[-1] == numbers(looped)[-1] < numbers(deep)[-1]
    assert numbers(plain)[0] != numbers(looped)[0]
    assert text.startswith("'The class ")


def test_one_sided_shampoo(run):
    adamw, shampoo, *table = run("one_sided_shampoo", "--steps", "12")
    assert max(numbers(adamw)[0], numbers(shampoo)[0]) < 5.0
    assert table[1].split()[:3] == ["matrices", "shampoo", "2"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("own", [True, False])
def test_lora_rite(run, own):
    if not own:
        pytest.importorskip("peft")
    _, kind, adamw, rite = run("lora_rite", "--steps", "3", *(["--own"] if own else []))
    assert kind == f"adapters of {'effkern.nn.lora' if own else 'peft'}"
    # The same from other factors of the same product; AdamW is not.
    assert numbers(rite)[0] == pytest.approx(numbers(rite)[1], abs=2e-4)
    assert abs(numbers(adamw)[0] - numbers(adamw)[1]) > 5e-4


def test_cached_soft_labels(run):
    _, size, with_labels, without = run("cached_soft_labels", "--steps", "4", "--k", "6")
    small, whole = numbers(size)
    assert small < 0.1 * whole
    assert numbers(with_labels)[0] != numbers(without)[0]
    assert torch.is_grad_enabled()
