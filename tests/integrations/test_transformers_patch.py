"""patch: the same model with another way to its loss; the library's loss and gradients, in float64, are the truth."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import effkern
from effkern.integrations.transformers import (
    patch,
    remove_fused_laurel,
    remove_laurel,
    teacher_hidden,
    unloop_layers,
    unpatch,
)
from tests.integrations.tiny_models import FAMILIES, OTHERS, VOCAB, causal, double, tokens, transformers
from tests.numerics import assert_as_good_as_eager, rel_err

ALL = (*FAMILIES, *OTHERS)
# The output layer's float32 sums run in another order, and through every layer.
CLOSE = 5e-6


def batch(rows=3, length=11):
    ids = tokens(rows, length)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, -3:] = -100
    return {"input_ids": ids, "labels": labels}


def loss_step(model, inputs, **options):
    """Loss and gradients of a training step."""
    model.train().zero_grad()
    loss = model(**inputs, **options).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same_step(got, want, bound=CLOSE):
    assert rel_err(got[0], want[0].double()) < bound
    assert set(got[1]) == set(want[1])
    for name, grad in want[1].items():
        assert rel_err(got[1][name], grad.double()) < bound, name


def own_float64(model, inputs):
    """The library's logits of a float64 copy, and their loss: its own loss would be float32."""
    wide = double(model).train()
    logits = wide(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in wide.named_parameters() if p.grad is not None}


def attributes(model):
    return [(type(m), set(vars(m)), list(m._modules), list(m._parameters)) for m in model.modules()]


@pytest.mark.parametrize("family", ALL)
def test_neutral_settings_change_nothing(family):
    """Logits bit for bit, loss and gradients as good as the library's, state dict and all after unpatch as before."""
    model, inputs = causal(family), batch()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    logits, before = model(input_ids=inputs["input_ids"]).logits, attributes(model)
    truth, eager = own_float64(model, inputs), loss_step(model, inputs)
    assert patch(model) is model
    fast = loss_step(model, inputs)
    assert_as_good_as_eager(fast[0], eager[0], truth[0], ulps=4)
    assert set(fast[1]) == set(eager[1]) == set(truth[1])
    for name, grad in fast[1].items():
        assert_as_good_as_eager(grad, eager[1][name], truth[1][name], ulps=4)
    assert torch.equal(model.eval()(input_ids=inputs["input_ids"]).logits, logits)
    assert list(model.state_dict()) == list(state)
    model.zero_grad()
    assert unpatch(model) is model
    assert attributes(model) == before
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    patch(model)


def test_the_models_are_not_neutral():
    """Where a softcap, a scale or a bias were left out, the loss would be another."""
    inputs = batch()
    for family, neutral in (
        ("Gemma2", {"final_logit_softcapping": 1e4}), ("Gemma3n", {"final_logit_softcapping": 1e4}),
        ("Cohere", {"logit_scale": 1.0}), ("Granite", {"logits_scaling": 1.0}),
    ):  # fmt: skip
        model = causal(family)
        other = causal(family, **neutral)
        other.load_state_dict(model.state_dict())
        a, b = (patch(m).train()(**inputs).loss for m in (model, other))
        assert abs(a - b) > 1e-2, family
    phi = causal("Phi")
    assert phi.lm_head.bias.norm() > 0.1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2", "GPTNeoX"])
def test_tied_and_untied_heads(family, tied):
    model, inputs = causal(family, tie_word_embeddings=tied), batch()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    same_step(loss_step(patch(copy.deepcopy(model)), inputs), loss_step(model, inputs))


@pytest.mark.parametrize(
    ("family", "options", "names"),
    [
        ("Llama", {"laurel": "rw+lr"}, 1), ("Qwen3", {"laurel": {"variant": "rw", "x0": True}}, 1),
        ("Gemma2", {"loop": (1, 3, 1)}, 0), ("Mistral", {"loop": {"start": 0, "stop": 2, "loops": 1}}, 0),
        ("Gemma3n", {"laurel": True}, 0),
    ],
)  # fmt: skip
def test_laurel_and_loops_at_their_neutral_settings(family, options, names):
    model, inputs = causal(family), batch()
    keys, before, want = list(model.state_dict()), attributes(model), loss_step(model, inputs)
    loss, grads = loss_step(patch(model, **options), inputs)
    assert len(grads) > len(want[1]) if names else len(grads) == len(want[1])
    same_step((loss, {n: grads[n] for n in want[1]}), want, 2e-5)
    model.zero_grad()
    unpatch(model)
    assert list(model.state_dict()) == keys
    assert attributes(model) == before


@pytest.mark.parametrize(
    ("family", "options", "undo"),
    [("Llama", {"laurel": True}, remove_laurel), ("Gemma3n", {"laurel": True}, remove_fused_laurel),
     ("Llama", {"loop": (1, 3, 2)}, unloop_layers)],
)  # fmt: skip
def test_layers_that_were_changed_back_by_hand(family, options, undo):
    model = causal(family)
    before = attributes(model)
    assert attributes(unpatch(undo(patch(model, **options)))) == before


def test_loops_do_something_and_generate_runs_them():
    model, inputs = causal("Qwen2"), batch()
    want, ids = loss_step(model, inputs)[0], tokens(1, 5)
    patch(model, loop=(1, 3, 3))
    assert abs(loss_step(model, inputs)[0] - want) > 1e-2
    model.eval()
    given = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **given), model.generate(ids, **given, use_cache=False))


def test_a_padded_output_layer():
    """64 rows, of which config.vocab_size count; the library cannot compute this loss at all."""
    model, inputs = causal("Llama", vocab_size=64), batch()
    model.config.vocab_size = VOCAB
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 50.0
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1, :VOCAB].flatten(0, 1)
    want = nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten())
    loss, grads = loss_step(patch(model), inputs)
    assert rel_err(loss, want.double()) < CLOSE
    assert not grads["lm_head.weight"][VOCAB:].any()
    # Or by hand, where the config counts the padding.
    model.config.vocab_size = 64
    assert torch.equal(loss_step(patch(unpatch(model), {"vocab_valid": VOCAB}), inputs)[0], loss)


def test_what_trainers_pass_along():
    """Token counts of several batches, shifted labels, another ignore_index, tuples."""
    plain, inputs = causal("Llama"), batch()
    model = patch(copy.deepcopy(plain))
    count = {"num_items_in_batch": torch.tensor(57)}
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    other = torch.where(inputs["labels"] == -100, 60, inputs["labels"])
    for extra in (count, {"num_items_in_batch": 57}, {"shift_labels": shifted.clone()},
                  {"labels": other, "ignore_index": 60}):  # fmt: skip
        given = {**inputs, **extra}
        same_step(loss_step(model, given), loss_step(plain, given))
    assert isinstance(model(**inputs, return_dict=False), tuple)
    assert rel_err(model(**inputs, return_dict=False)[0], plain.train()(**inputs).loss.double()) < CLOSE
    seen = model(**inputs, output_hidden_states=True)
    assert seen.logits is None
    assert len(seen.hidden_states) == 5
    # By position, as scripts of old call GPT-2.
    gpt, old = causal("GPT2").train(), {"labels": inputs["labels"]}
    want = gpt(inputs["input_ids"], None, torch.ones_like(inputs["input_ids"]), **old).loss
    assert (
        rel_err(patch(gpt)(inputs["input_ids"], None, torch.ones_like(inputs["input_ids"]), **old).loss, want.double())
        < CLOSE
    )


def test_logits_beside_the_loss():
    model, inputs = causal("Gemma2"), batch()
    want = model(**inputs)
    patch(model)
    got = model(**inputs)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)
    assert model(**inputs, skip_logits=True).logits is None
    assert torch.equal(model.train()(**inputs, skip_logits=False).logits, want.logits)
    assert patch(unpatch(model), {"skip_logits": True}).eval()(**inputs).logits is None


@pytest.mark.parametrize(
    ("sizes", "options"), [({}, {"z_loss": 0.1}), ({}, {"label_smoothing": 0.3}), ({"vocab_size": 64}, {})]
)
def test_logits_do_not_change_the_loss(sizes, options):
    """z_loss, smoothing and a padded vocabulary count in evaluation, too, and with skip_logits=False."""
    model, inputs = causal("Gemma2", **sizes), batch()
    model.config.vocab_size = VOCAB
    logits = model(input_ids=inputs["input_ids"]).logits
    want = loss_step(patch(model, options), inputs)
    same_step(loss_step(model, inputs, skip_logits=False), want, 1e-7)
    for output in (model(**inputs, skip_logits=False), model.eval()(**inputs)):
        assert rel_err(output.loss, want[0].double()) < 1e-6
        assert torch.equal(output.logits, logits)
    with pytest.raises(ValueError, match=r"logits_to_keep must be 0 with a teacher, or with a z_loss, .* got 3"):
        model(**inputs, logits_to_keep=3)


def test_generate_and_its_caches_are_untouched():
    model, ids = causal("Qwen3"), tokens(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(ids, **options)
    got = patch(model).generate(ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))


# With a teacher --------------------------------------------------------------------------------------------------

KD = {"temperature": 2.0, "teacher_temperature": 2.0, "t_squared": True, "omega": 0.7}


def mixed(logits, teacher_logits, labels, T=2.0, omega=0.7):
    """The textbook's mixture, over tokens that have a label behind them."""
    kept = labels[:, 1:] != -100
    z, u = logits[:, :-1][kept].double(), teacher_logits[:, :-1][kept].double()
    soft = nn.functional.kl_div(
        torch.log_softmax(z / T, -1), torch.log_softmax(u / T, -1), log_target=True, reduction="batchmean"
    )
    return omega * soft * T * T + (1 - omega) * nn.functional.cross_entropy(z, labels[:, 1:][kept])


@pytest.mark.parametrize(("student", "teacher"), [("Llama", "Gemma2"), ("Gemma3n", "GPT2"), ("Cohere", "Phi")])
def test_a_teacher_of_another_family(student, teacher):
    """Hidden states of another size, softcaps and scales on both sides: the textbook's formula on both logits."""
    changes = {"n_embd": 48} if teacher == "GPT2" else {"hidden_size": 48}
    model, other, inputs = causal(student), causal(teacher, **changes), batch()
    logits = model.train()(input_ids=inputs["input_ids"]).logits
    want = mixed(logits, other(input_ids=inputs["input_ids"]).logits.detach(), inputs["labels"])
    want.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    patch(model, KD)
    rows = teacher_hidden(other, **inputs)
    same_step(loss_step(model, inputs, teacher=rows), (want.detach(), grads), 2e-5)
    assert all(p.grad is None for p in other.parameters())
    # omega at the call is the one that counts.
    zero = loss_step(model, inputs, teacher=rows, omega=0.0)[0]
    assert rel_err(zero, loss_step(model, inputs)[0].double()) < CLOSE


def test_every_kind_of_teacher():
    model, inputs = causal("Llama"), batch()
    u = causal("Qwen2")(input_ids=inputs["input_ids"]).logits.detach()
    want = mixed(model(input_ids=inputs["input_ids"]).logits, u, inputs["labels"])
    patch(model, {**KD, "teacher_kind": "renormalized"})
    everything = torch.arange(VOCAB).expand(u.shape).contiguous()
    for given in (
        {"teacher": effkern.TeacherLogits(u)},
        {"teacher": effkern.TeacherLogProbs(u.log_softmax(-1))},
        {"teacher_ids": everything, "teacher_logprobs": u.log_softmax(-1)},
    ):
        assert rel_err(loss_step(model, inputs, **given)[0], want) < 1e-5
    output = model.eval()(**inputs, teacher=effkern.TeacherLogits(u))
    assert rel_err(output.loss, want) < 1e-5
    assert torch.equal(output.logits, unpatch(model)(input_ids=inputs["input_ids"]).logits)


# Copies, files, compilers ----------------------------------------------------------------------------------------


def test_copies_pickles_and_saved_models(tmp_path):
    model, inputs = causal("Llama", tie_word_embeddings=True), batch()
    want = loss_step(patch(model), inputs)
    again = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again.append(torch.load(file, weights_only=False))
    model.save_pretrained(tmp_path)
    again.append(patch(transformers.LlamaForCausalLM.from_pretrained(tmp_path)))
    for other in again:
        same_step(loss_step(other, inputs), want, 1e-7)
        unpatch(other)


def test_new_models_of_a_patched_models_class(tmp_path):
    """type(model)(config) and from_pretrained give models without a patch, which may get one."""
    model, inputs = patch(causal("Llama")).train(), batch()
    want = loss_step(model, inputs)
    model.save_pretrained(tmp_path)
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    for other in (fresh, type(model).from_pretrained(tmp_path)):
        other.train()
        assert other(**inputs).logits is not None
        with pytest.raises(TypeError, match=r"must be patched itself to take a teacher .* got omega"):
            other(**inputs, omega=0.5)
        same_step(loss_step(other, inputs), want)
        same_step(loss_step(patch(other), inputs), want, 1e-7)
        assert other(**inputs).logits is None
        assert type(unpatch(other)) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_gradient_checkpointing(family):
    model, inputs = causal(family), batch()
    want = loss_step(patch(model), inputs)
    model.gradient_checkpointing_enable()
    same_step(loss_step(model, inputs), want, 1e-7)


def test_compile_fullgraph():
    """One graph with its backward, with a teacher and a softcap."""
    model, inputs = patch(causal("Gemma2", num_hidden_layers=1), KD), batch()
    given = {"teacher": effkern.TeacherLogits(torch.randn(3, 11, VOCAB))}
    want = loss_step(model, inputs, **given)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(**inputs, **given).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    same_step((loss.detach(), grads), want)


def test_bfloat16_logits_are_not_rounded():
    """On the model's own bfloat16 hidden states the loss is the exact one; the library rounds logits first."""
    model, inputs = causal("Llama").bfloat16(), batch()
    hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state.double()
    logits = (hidden @ model.lm_head.weight.double().T)[:, :-1].flatten(0, 1)
    truth = nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten()).detach()
    eager = loss_step(model, inputs)
    fast = loss_step(patch(model), inputs)
    assert rel_err(fast[0], truth) < 1e-6 < rel_err(eager[0], truth)
    assert all(grad.isfinite().all() for grad in fast[1].values())
    wide = own_float64(unpatch(model), inputs)[1]["lm_head.weight"]
    assert_as_good_as_eager(fast[1]["lm_head.weight"], eager[1]["lm_head.weight"], wide, factor=1.5)


def test_autocast():
    model, inputs = causal("Llama"), batch()
    with torch.autocast("cpu", torch.bfloat16):
        eager = loss_step(model, inputs)
        fast = loss_step(patch(model), inputs)
    truth = own_float64(unpatch(model), inputs)
    assert fast[1]["lm_head.weight"].dtype == torch.float32
    assert rel_err(fast[0], truth[0]) < max(2 * rel_err(eager[0], truth[0]), 0.004)
