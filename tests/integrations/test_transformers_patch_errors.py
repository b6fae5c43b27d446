"""patch: what it refuses, by class and reason, and that the model is then as it was."""

import functools

import pytest
import torch
from torch import nn

import effkern
from effkern.integrations.transformers import apply_laurel, patch, unpatch
from tests.integrations.test_transformers_patch import KD, attributes, batch, loss_step
from tests.integrations.tiny_models import VOCAB, causal, transformers


class Int8Head(nn.Linear):
    pass


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def other_head(model):
    model.lm_head = Int8Head(32, VOCAB, bias=False)


def integer_head(model):
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 32, dtype=torch.int8), requires_grad=False)


def small_head(model):
    model.lm_head = nn.Linear(32, VOCAB - 1, bias=False)


def own_loss(model):
    model.loss_function = torch.nn.functional.mse_loss


def own_forward(model):
    model.forward = lambda *args, **kwargs: None


def own_head_forward(model):
    model.lm_head.forward = lambda x: x


def float8_head(model):
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 32).to(torch.float8_e4m3fn), requires_grad=False)


def watched_head(model):
    model.lm_head.register_forward_hook(lambda module, given, logits: logits / 2.0)


def head_with_a_gradient_hook(model):
    model.lm_head.register_full_backward_pre_hook(lambda module, grads: None)


def head_of_a_patched_model(model):
    model.lm_head = patch(causal("Qwen2")).lm_head
    model.config.tie_word_embeddings = False


def nothing(model):
    return None


@pytest.mark.parametrize(
    ("change", "options", "kind", "message"),
    [
        (untied, {}, ValueError, r"output layer of Qwen2ForCausalLM must be tied to the embedding, .* got a weight of"),
        (other_head, {}, TypeError, r"layer of Qwen2ForCausalLM must be a torch.nn.Linear .* got .*Int8Head"),
        (integer_head, {}, TypeError, r"must have an unquantized floating weight, got Tensor of torch.int8"),
        (float8_head, {}, TypeError, r"must have an unquantized floating weight, got Tensor of torch.float8_e4m3fn"),
        (watched_head, {}, ValueError, r"output layer of Qwen2ForCausalLM must have no hooks, .* got 1 forward hooks"),
        (head_with_a_gradient_hook, {}, ValueError, r"Qwen2ForCausalLM must have no hooks, .* got 1 backward hooks"),
        (head_of_a_patched_model, {}, ValueError, r"Qwen2ForCausalLM must be unchanged and its own .* got a patched"),
        (small_head, {}, ValueError, r"must cover config.vocab_size=61, got 60 rows"),
        (own_loss, {}, ValueError, r"loss of Qwen2ForCausalLM must be transformers' ForCausalLMLoss, got mse_loss"),
        (own_forward, {}, ValueError, r"Qwen2ForCausalLM must have its class's forward .* got one of its own"),
        (own_head_forward, {}, ValueError, r"output layer of Qwen2ForCausalLM must have its class's forward"),
        (patch, {}, ValueError, r"Qwen2ForCausalLM must be unchanged \(unpatch first\), got one with distill_loss"),
        (apply_laurel, {"laurel": "rw"}, ValueError, r"apply_laurel: model must be unchanged"),
        (nothing, {"laurel": "none"}, ValueError, r"variant must be one of .*got 'none'"),
        (nothing, {"laurel": 3}, TypeError, r"patch: laurel must be True, a variant or arguments .* got 3"),
        (nothing, {"loop": (0, 9, 2)}, ValueError, r"must be 0 <= start < stop <= 4 layers, got 0, 9"),
        (nothing, {"loop": (0, 2)}, TypeError, r"patch: loop must be \(start, stop, loops\) or .* got \(0, 2\)"),
        (nothing, {"loop": (0, 2, 2), "laurel": True}, ValueError, r"laurel and loop must not come together"),
        (nothing, {"distill_loss": False}, ValueError, r"distill_loss, laurel or loop must ask for something"),
        (nothing, {"distill_loss": "jsd"}, TypeError, r"distill_loss must be True, False or options .* got 'jsd'"),
        (nothing, {"distill_loss": {"softcap": 2.0}}, TypeError, r"softcap must be left out of distill_loss"),
        (nothing, {"distill_loss": {"tau": 2.0}}, TypeError, r"options must be among .* got \['tau'\]"),
        (nothing, {"distill_loss": {"omega": 2}}, ValueError, r"omega must be in \[0, 1\], got 2"),
        (nothing, {"distill_loss": {"teacher_kind": "top"}}, ValueError, r"teacher_kind must be one of .* got 'top'"),
        (nothing, {"distill_loss": {"vocab_valid": 62}}, ValueError, r"vocab_valid must be in 1 ... 61, .* got 62"),
        (nothing, {"distill_loss": {"temperature": 0.0}}, ValueError, r"temperature must be .* got 0.0"),
        (nothing, {"distill_loss": {"divergence": "l2"}}, ValueError, r"divergence must be one of .* got 'l2'"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(change, options, kind, message):
    model = causal("Qwen2", tie_word_embeddings=True)
    change(model)
    before, state = attributes(model), list(model.state_dict())
    with pytest.raises(kind, match=message):
        patch(model, **options)
    assert attributes(model) == before
    assert list(model.state_dict()) == state


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantized_head_of_torch():
    model = causal("Llama")
    model.lm_head = torch.ao.nn.quantized.dynamic.Linear(32, VOCAB)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Linear \(no quantized or adapted one\), got torch.ao.nn."):
        patch(model)


def test_other_architectures_and_wrapped_models():
    for model, name in (
        (nn.Linear(2, 2), "Linear"),
        (transformers.OPTForCausalLM(transformers.OPTConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, ffn_dim=8, num_attention_heads=2, word_embed_proj_dim=8,
        )), "OPTForCausalLM"),
        (causal("Llama").model, "LlamaModel"),
        (nn.DataParallel(causal("Llama")), "DataParallel"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"patch: model must be a causal language model of .* got {name}$"):
            patch(model)
    with pytest.raises(ValueError, match=r"apply_laurel: model must hold one stack of .* got GPT2LMHeadModel with 0"):
        patch(causal("GPT2"), laurel=True)
    with pytest.raises(ValueError, match=r"laurel must be True or arguments of use_fused_laurel for Gemma3n, got 'rw'"):
        patch(causal("Gemma3n"), laurel="rw")
    with pytest.raises(ValueError, match="unpatch: model must be one that patch was applied to, got LlamaForCausalLM"):
        unpatch(causal("Llama"))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_class_whose_forward_was_replaced(wrapped, monkeypatch):
    """For all models at once, as other packages do; with functools.wraps it looks like the library's own."""
    own = transformers.LlamaForCausalLM
    forward = own.forward

    def doubled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.loss = 2 * output.loss
        return output

    monkeypatch.setattr(own, "forward", functools.wraps(forward)(doubled) if wrapped else doubled)
    with pytest.raises(ValueError, match=rf"must have the library's forward .* got one of {__name__}"):
        patch(causal("Llama"))


def test_calls_that_cannot_be_answered():
    model, inputs = patch(causal("Llama"), KD).train(), batch()
    teacher = effkern.TeacherLogits(torch.randn(3, 11, VOCAB))
    ids = {"input_ids": inputs["input_ids"]}
    with pytest.raises(TypeError, match="LlamaForCausalLM: input_ids must be given once"):
        model(ids["input_ids"], **inputs)
    with pytest.raises(TypeError, match="forward must get at most 8 arguments by position, got 9"):
        model(*[None] * 9)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: labels must be given with a teacher .* got None"):
        model(**ids, teacher=teacher)
    with pytest.raises(ValueError, match=r"logits_to_keep must be 0 with a teacher, .* got 3"):
        model(**inputs, teacher=teacher, logits_to_keep=3)
    with pytest.raises(ValueError, match="must come together, got teacher_ids alone"):
        model(**inputs, teacher_ids=torch.zeros(3, 11, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be given in one way, got TeacherLogits and teacher_ids"):
        model(**inputs, teacher=teacher, teacher_ids=ids, teacher_logprobs=ids)
    with pytest.raises(ValueError, match=r"leading dimensions of hidden, \[3, 11\], got \[3, 10\]"):
        model(**inputs, teacher=effkern.TeacherLogits(torch.randn(3, 10, VOCAB)))
    model.resize_token_embeddings(70)
    with pytest.raises(TypeError, match=r"the output layer must be the one that patch has seen.*linear.Linear"):
        model(**inputs)


def another_loss(model):
    model.loss_function = torch.nn.functional.mse_loss


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("Llama", another_loss, r"the loss must be the one that patch has seen \(unpatch, .* got mse_loss"),
        ("Gemma2", lambda m: setattr(m.config, "final_logit_softcapping", None), "softcap must be 3.0, as .* got None"),
        ("Granite", lambda m: setattr(m.config, "logits_scaling", 2.0), "logit scale must be 0.4, as .* got 0.5"),
        ("Llama", lambda m: setattr(m.config, "vocab_size", 60), "vocab_size must be 61, as patch has .* got 60"),
    ],
)
def test_changes_after_patch(family, change, message):
    """The library's forward would follow them, where training did not."""
    model, inputs = patch(causal(family)).train(), batch()
    change(model)
    with pytest.raises(ValueError, match=f"{type(model).__name__}: .*{message}"):
        model(**inputs)
    # The whole of a tied layer may grow with its embedding.
    model = patch(causal("Llama", tie_word_embeddings=True)).train()
    model.resize_token_embeddings(70)
    inputs["labels"].fill_(69)
    torch.testing.assert_close(model(**inputs).loss, model(**inputs, skip_logits=False).loss)


def test_without_any_label_the_loss_is_zero():
    model, inputs = patch(causal("Llama")), batch()
    inputs["labels"].fill_(-100)
    for given in ({}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(0)}):
        loss, grads = loss_step(model, inputs, **given)
        assert loss == 0
        assert not any(grad.any() for grad in grads.values())
