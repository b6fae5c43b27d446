"""Exported folders: transformers loads them, and they compute what the decoder computes."""

import json
from dataclasses import replace

import pytest
import torch

from effkern import cli
from effkern.data.tokenizer import load_encoder
from effkern.models import DecoderConfig, LaurelConfig, LoopConfig, generate
from effkern.train.export_hf import export_hf, is_llama
from effkern.train.loop import train
from effkern.train.restore import load_model
from tests.train.fixtures import at

transformers = pytest.importorskip("transformers")

PADDED = {"vocab_multiple": 64, "num_layers": 2, "rope_theta": 500.0}
LAUREL = {"residual": "laurel", "laurel": LaurelConfig(variant="rw+lr+pa", rank=4, x0=True)}
# What is made while the model is, or drawn, must survive a start on the meta device.
LOOPED = {
    "stack": "looped",
    "num_layers": 3,
    "residual": "laurel",
    "laurel": LaurelConfig(rank=4),
    "loop": LoopConfig(stages="1x1,1x3,1x1", init="noise", injection="gate", conditioning="time", norm=True),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Remote code is copied below the test's own folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def trained(base, tmp_path):
    def make(name="run", **model):
        config = at(base, tmp_path / name, schedule__steps=8)
        train(replace(config, model=replace(config.model, **model)), quiet=True)
        return tmp_path / name

    return make


@pytest.mark.parametrize("parts", [PADDED, {**PADDED, "tie_head": False, "num_kv_heads": 2}], ids=["tied", "head"])
def test_a_plain_decoder_is_a_llama_with_equal_logits(trained, tmp_path, parts):
    run = trained(**parts)
    assert export_hf(run, tmp_path / "out") == "llama"
    model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    own = load_model(run).model
    tokens = torch.randint(0, 300, (3, 32))
    expected, found = own.logits(own(tokens)), model.eval()(tokens).logits
    assert found.shape == (3, 32, 300)
    # Other products in another order: float32's rounding.
    assert (found - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())
    prompt = {"input_ids": tokens[:, :5], "attention_mask": torch.ones(3, 5, dtype=torch.int64)}
    continued = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(continued, generate(own, tokens[:, :5], 6))


@pytest.mark.parametrize("parts", [LAUREL, LOOPED], ids=["laurel", "looped"])
def test_any_other_decoder_goes_with_its_own_code_and_the_same_bits(trained, tmp_path, cache, parts):
    run = trained(**parts)
    assert export_hf(run, tmp_path / "out") == "effkern"
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "out", trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    own = load_model(run).model
    tokens = torch.randint(0, 300, (3, 20))
    expected = own.logits(own(tokens))
    found = model.eval()(tokens, labels=tokens)
    assert torch.equal(found.logits, expected)
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    # As transformers' Trainer divides where it accumulates gradients.
    shared = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(4 * 3 * 19)).loss
    assert shared.item() == pytest.approx(loss.item() / 4, rel=1e-6)
    continued = model.generate(tokens[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=299, eos_token_id=None)
    assert torch.equal(continued, generate(own, tokens[:, :5], 6))
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again.eval()(tokens).logits, expected)


def test_padding_at_the_right_changes_nothing_and_at_the_left_is_refused(trained, tmp_path, cache):
    export_hf(trained(**LAUREL), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokens, mask = torch.randint(0, 300, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    alone = model(tokens[1:, :5]).logits
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits[1:, :5], alone)
    with pytest.raises(ValueError, match="0 at the right alone"):
        model(tokens, attention_mask=mask.flip(-1))
    with pytest.raises(ValueError, match="prompts of equal length"):
        model.generate(tokens, attention_mask=mask, max_new_tokens=2, pad_token_id=0)


def test_the_tokenizer_goes_along_and_encodes_as_in_training(trained, tmp_path):
    run = trained()
    export_hf(run, tmp_path / "out")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    ours = load_encoder(run / "tokenizer.json")
    for text in ("alpha beta\n  gamma", " <|endoftext|> naïve\t", ""):
        assert theirs(text).input_ids == ours.encode([text])[0]
        assert theirs.decode(theirs(text).input_ids) == text
    assert (theirs.eos_token, theirs.eos_token_id) == (ours.eos_token, ours.eos_id)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


def test_the_command_names_the_layout_and_refuses_what_it_cannot_do(trained, tmp_path, capsys):
    plain, other = trained(), trained("laurel", **LAUREL)
    out = tmp_path / "out"
    assert cli.main(["export", "--checkpoint", str(plain), "--out", str(out)]) == 0
    assert "layout llama" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    for arguments, rule in (
        (["--checkpoint", str(plain), "--out", str(out)], "out must be a new folder"),
        (["--checkpoint", str(other), "--out", str(out / "x"), "--layout", "llama"], "layout must be 'effkern'"),
    ):
        assert cli.main(["export", *arguments]) == 1
        assert rule in capsys.readouterr().err
    (other / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer of the run"):
        export_hf(other, tmp_path / "third")
    assert not list(tmp_path.glob("*third*"))
    assert not is_llama(DecoderConfig(**LAUREL))
