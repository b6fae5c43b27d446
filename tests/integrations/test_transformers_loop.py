"""loop_layers: an unrolled model with tied weights, in training and generation, and back."""

import copy
import io

import pytest
import torch

from effkern.integrations.transformers import apply_laurel, loop_layers, unloop_layers
from tests.integrations.tiny_models import FAMILIES, decoder, step, tokens, transformers
from tests.integrations.unrolled import generation, unrolled
from tests.numerics import rel_err

# Windows shorter than the sequences, in some of the layers.
WINDOWS = {
    "Mistral": {"sliding_window": 5},
    **{
        f: {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
        for f in ("Gemma2", "Gemma3")
    },
}
MODES = ("recompute", "full", "recompute_layer", "autograd")


def model_of(family="Llama", **changes):
    return decoder(family, **{**WINDOWS.get(family, {}), **changes}).double()


def assert_same(found, want, bound=1e-12):
    assert found.keys() == want.keys()
    for name, grad in want.items():
        assert rel_err(found[name], grad) < bound, name


@pytest.mark.parametrize("damping", [None, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_that_of_the_unrolled_model(family, damping):
    """Logits, and the gradient of every parameter, with the weights of repeated layers tied."""
    model, ids = model_of(family), tokens()
    want, _ = step(unrolled(model, 1, 3, 3, damping), ids)
    want_grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    plain = model(input_ids=ids).logits
    assert rel_err(plain, want) > 1e-3
    loop_layers(model, 1, 3, 3, damping=damping)
    got, grads = step(model, ids)
    # Gemma's norms round to float32, and so may turn the last bit of a sum in another order into one of float32.
    bound = 1e-6 if family.startswith("Gemma") and damping else 1e-12
    assert rel_err(got, want) < bound
    assert_same(grads, want_grads, bound)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("start", "stop", "loops"), [(0, 4, 2), (0, 1, 4), (3, 4, 3), (1, 3, 1)])
def test_every_mode_and_place(mode, start, stop, loops):
    model, ids = model_of(), tokens()
    want, _ = step(unrolled(model, start, stop, loops, 2), ids)
    want_grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    loop_layers(model, start, stop, loops, damping=2, mode=mode)
    got, grads = step(model, ids)
    assert rel_err(got, want) < 1e-12
    assert_same(grads, want_grads)


def test_recompute_runs_a_loop_twice_and_full_once():
    for mode, count in (("recompute", 6), ("full", 3), ("autograd", 3)):
        model, calls = loop_layers(model_of(), 1, 3, 3, mode=mode), []
        model.model.layers[2].mlp.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        step(model, tokens())
        assert len(calls) == count


@pytest.mark.parametrize("damping", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_that_of_the_unrolled_model(family, damping):
    """With a cache and without, behind a prompt that is longer than the window."""
    model, ids = model_of(family), tokens(2, 8)
    want, want_logits = generation(unrolled(model, 1, 3, 4, damping), ids, use_cache=True)
    loop_layers(model, 1, 3, 4, damping=damping)
    for use_cache in (True, False):
        got, logits = generation(model, ids, use_cache=use_cache)
        assert torch.equal(got, want)
        assert rel_err(logits, want_logits) < (1e-6 if family.startswith("Gemma") else 1e-12)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_beams_and_static_caches(family, options):
    model, ids = model_of(family), tokens(2, 6)
    reference = unrolled(model, 0, 2, 3)
    loop_layers(model, 0, 2, 3)
    with torch.no_grad():
        arguments = {"max_new_tokens": 6, "do_sample": False, **options}
        assert torch.equal(model.generate(ids, **arguments), reference.generate(ids, **arguments))


def test_padded_batches():
    model, ids = model_of(), tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    reference = unrolled(model, 1, 2, 3)
    loop_layers(model, 1, 2, 3)
    options = {"attention_mask": mask, "use_cache": True}
    got, want = generation(model, ids, **options), generation(reference, ids, **options)
    assert torch.equal(got[0], want[0])
    assert rel_err(got[1], want[1]) < 1e-12


def test_every_loop_has_its_entry_in_the_cache():
    model, ids = loop_layers(model_of(), 1, 3, 3), tokens(2, 6)
    for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        assert len(cache.layers) == 4 + 2 * 2
        assert {layer.keys.shape for layer in cache.layers} == {(2, 2, 6, 8)}
        kept = torch.stack([layer.keys for layer in cache.layers])
        assert all((kept[i] - kept[j]).norm() > 1e-3 for i in range(8) for j in range(i))


def test_a_cache_of_other_loops_is_refused():
    model, ids = model_of(), tokens()
    caches = {}
    for name, span in (("plain", None), ("other", (1, 3, 2)), ("same", (1, 3, 3))):
        if span:
            loop_layers(model, *span)
        with torch.no_grad():
            caches[name] = model(input_ids=ids, use_cache=True).past_key_values
        if span:
            unloop_layers(model)
    loop_layers(model, 1, 3, 3)
    rule = "past_key_values must be empty or filled by layers 1 to 2 in 3 loops, got one filled with "
    with pytest.raises(ValueError, match=rule + "no loops"):
        model(input_ids=ids[:, :1], past_key_values=caches["plain"])
    with pytest.raises(ValueError, match=rule + "layers 1 to 2 in 2 loops"):
        model(input_ids=ids[:, :1], past_key_values=caches["other"])
    with torch.no_grad():
        more = model(input_ids=ids[:, :1], past_key_values=caches["same"]).logits
        whole = model(input_ids=torch.cat((ids, ids[:, :1]), 1)).logits
    assert rel_err(more, whole[:, -1:]) < 1e-12


def test_a_cache_of_another_damping_is_refused():
    model, ids = loop_layers(model_of(), 1, 3, 3, damping=3), tokens()
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    for damping, mine in ((None, ""), (2, " with damping 2")):
        loop_layers(unloop_layers(model), 1, 3, 3, damping=damping)
        with pytest.raises(ValueError, match=f"in 3 loops{mine}, got one filled with .* 3 loops with damping 3$"):
            model(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_with_gradients_may_fill_a_cache_and_go_on_from_it(mode):
    """transformers makes a cache in training too; a loop that runs again must leave it alone."""
    model, ids = model_of(), tokens(2, 9)
    want, want_grads = step(loop_layers(model, 1, 3, 3, mode="autograd"), ids)
    unloop_layers(model)
    loop_layers(model, 1, 3, 3, mode=mode)
    model.zero_grad()
    out = model(input_ids=ids, use_cache=True)
    weight = torch.sin(torch.arange(want.numel())).view(want.shape)
    (out.logits * weight).sum().backward()
    assert rel_err(out.logits, want) < 1e-12
    assert_same({n: p.grad for n, p in model.named_parameters()}, want_grads)
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {9}
    # On top of a filled cache: the gradient of the new positions' logits.
    with torch.no_grad():
        past = model(input_ids=ids, use_cache=True).past_key_values
    model.zero_grad()
    model(input_ids=ids[:, :2], past_key_values=past).logits.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.norm() > 0 for p in model.parameters())
    assert {layer.keys.shape[2] for layer in past.layers} == {11}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing(mode, reentrant):
    model, ids = loop_layers(model_of(), 1, 3, 3, damping=3, mode=mode).train(), tokens()
    want, want_grads = step(model, ids)
    # Its newer name is not in transformers 5.0.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
    got, grads = step(model, ids)
    assert len(calls) == 2
    assert rel_err(got, want) < 1e-12
    assert_same(grads, want_grads)


def test_dropout_is_repeated_in_backward():
    """The gradient of a looped model with dropout is that of the loss it computed."""
    ids, found = tokens(), {}
    for mode in ("autograd", "recompute", "full"):
        torch.manual_seed(3)
        model = loop_layers(model_of(attention_dropout=0.3), 1, 3, 3, mode=mode).train()
        torch.manual_seed(5)
        found[mode] = step(model, ids)
    for mode in ("recompute", "full"):
        assert rel_err(found[mode][0], found["autograd"][0]) < 1e-12
        assert_same(found[mode][1], found["autograd"][1])


def test_gradients_in_bfloat16_are_summed_in_float32():
    """24 visits of a layer: nearer to float64 than autograd, which rounds its sum after each."""
    ids, errors = tokens(2, 12), {}
    for mode in ("recompute", "full", "autograd"):
        torch.manual_seed(1)
        model = decoder("Llama", num_hidden_layers=3).bfloat16()
        truth = step(loop_layers(copy.deepcopy(model).double(), 1, 2, 24, damping=24), ids)[1]
        grads = step(loop_layers(model, 1, 2, 24, damping=24, mode=mode), ids)[1]
        names = [n for n in truth if ".layers.1." in n and "proj" in n]
        errors[mode] = sum(rel_err(grads[n], truth[n]) for n in names) / len(names)
    assert errors["recompute"] == errors["full"] < errors["autograd"]


def test_the_state_dict_and_everything_else_comes_back():
    model, ids = model_of("Qwen3"), tokens()
    keys, want = list(model.state_dict()), model(input_ids=ids).logits
    attributes = [(type(m), set(vars(m)), set(m._modules)) for m in model.modules()]
    assert loop_layers(model, 1, 3, 2) is model
    assert list(model.state_dict()) == keys
    assert rel_err(model(input_ids=ids).logits, want) > 1e-3
    assert unloop_layers(model) is model
    assert torch.equal(model(input_ids=ids).logits, want)
    assert [(type(m), set(vars(m)), set(m._modules)) for m in model.modules()] == attributes
    assert not model.model._forward_pre_hooks
    loop_layers(model, 0, 4, 2)


def test_one_loop_is_the_plain_model():
    model, ids = model_of(), tokens()
    want, want_grads = step(model, ids)
    got, grads = step(loop_layers(model, 1, 3, 1), ids)
    assert rel_err(got, want) < 1e-14
    assert_same(grads, want_grads)


def test_other_heads_and_hidden_states():
    model = transformers.LlamaForSequenceClassification(decoder("Llama").config).double().eval()
    ids = tokens()
    want = model.model(input_ids=ids).last_hidden_state
    loop_layers(model, 1, 3, 4)
    out = model.model(input_ids=ids, output_hidden_states=True)
    assert rel_err(out.last_hidden_state, want) > 1e-3
    assert len(out.hidden_states) == 5
    assert torch.equal(out.hidden_states[1], out.hidden_states[2])
    assert rel_err(out.hidden_states[3], out.hidden_states[2]) > 1e-3
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_a_pickled_model_computes_the_same():
    """To and from bytes that this test made itself."""
    model, ids, file = loop_layers(model_of(), 1, 3, 3, damping=3), tokens(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    other = copy.deepcopy(model)
    unloop_layers(other)
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    assert rel_err(other(input_ids=ids).logits, model(input_ids=ids).logits) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_a_break(mode):
    model, ids = loop_layers(model_of(num_hidden_layers=3), 1, 2, 2, damping=2, mode=mode), tokens()
    want, want_grads = step(model, ids)
    got, grads = step(torch.compile(model, backend="aot_eager", fullgraph=True), ids)
    assert rel_err(got, want) < 1e-12
    assert_same({n.removeprefix("_orig_mod."): g for n, g in grads.items()}, want_grads)


def test_errors():
    model, ids = model_of(), tokens()
    for arguments, options, rule in (
        ((1, 3, 0), {}, "loops must be at least 1, got 0"),
        ((3, 3, 2), {}, r"start, stop must be 0 <= start < stop <= 4 layers, got 3, 3"),
        ((-1, 3, 2), {}, r"start, stop must be .* got -1, 3"),
        ((1, 5, 2), {}, r"start, stop must be .* got 1, 5"),
        ((1, 3, 2), {"damping": 0}, "damping must be at least 1, got 0"),
        ((1, 3, 2), {"mode": "fast"}, "mode must be one of .*, got 'fast'"),
    ):
        with pytest.raises(ValueError, match="loop_layers: " + rule):
            loop_layers(model, *arguments, **options)
    with pytest.raises(TypeError, match=r"loop_layers: loops must be a whole number, got 2\.0"):
        loop_layers(model, 1, 3, 2.0)
    for damping in (1.5, "2", float("inf"), True):
        with pytest.raises(TypeError, match=f"loop_layers: damping must be a whole number, got {damping!r}"):
            loop_layers(model, 1, 3, 2, damping=damping)
    with pytest.raises(ValueError, match="unloop_layers: model must be one that loop_layers was applied to"):
        unloop_layers(model)
    loop_layers(model, 1, 3, 2)
    with pytest.raises(ValueError, match=r"loop_layers: model must be unchanged \(unloop_layers"):
        loop_layers(model, 0, 1, 2)
    with pytest.raises(ValueError, match="model must be unchanged"):
        apply_laurel(model)
    with pytest.raises(RuntimeError, match="a looped layer must be called by its model"):
        model.model.layers[1](torch.zeros(1, 2, 32).double())
    unloop_layers(model)
    assert torch.isfinite(model(input_ids=ids).logits).all()
