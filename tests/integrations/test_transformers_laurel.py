"""apply_laurel: the same model at the start, the paper's formulas after it, and back."""

import copy
import io

import pytest
import torch

from effkern.integrations.transformers import apply_laurel, remove_laurel
from effkern.nn import LaurelResidual
from tests.integrations import plain_llama
from tests.integrations.tiny_models import FAMILIES, decoder, double, shaken, step, tokens, transformers
from tests.numerics import rel_err

VARIANTS = ("rw", "lr", "pa-id", "pa-shared", "rw+lr", "rw+pa", "rw+pa-shared", "rw+lr+pa")
PLACEMENTS = ("both", "attn", "ffn", "block")


def changed(variant="rw+lr", family="Llama", num_layers=4, **options):
    """A model in which every residual has left its start."""
    torch.manual_seed(7)
    model = apply_laurel(decoder(family, num_hidden_layers=num_layers), variant, rank=4, **options)
    return shaken(model, "laurel_")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["rw", "rw+lr+pa"])
def test_at_the_start_nothing_changes(family, variant):
    model, ids = decoder(family), tokens()
    want, want_grads = step(model, ids)
    for placement in PLACEMENTS:
        apply_laurel(model, variant, rank=4, placement=placement, x0=True)
        got, grads = step(model, ids)
        assert rel_err(got, want.double()) < 2e-6
        for name, grad in want_grads.items():
            assert rel_err(grads[name], grad.double()) < 2e-5, name
        remove_laurel(model)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_the_start_in_bfloat16(family):
    """No further from float32 than the library's own rounding, and the scalars stay float32."""
    model, ids = decoder(family), tokens(4, 16)
    truth = double(model)(input_ids=ids).logits
    model.bfloat16()
    own = rel_err(model(input_ids=ids).logits, truth)
    apply_laurel(model, rank=4)
    assert rel_err(model(input_ids=ids).logits, truth) < 1.1 * own
    kinds = {n.split(".")[-1]: p.dtype for n, p in model.named_parameters() if "laurel_" in n}
    assert kinds == {"weights": torch.float32, "down": torch.bfloat16, "up": torch.bfloat16}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_formulas(variant, placement):
    """Logits and the gradient of every parameter, new and old, against the formulas in float64."""
    model, ids = changed(variant, placement=placement), tokens()
    logits, grads = step(model, ids)

    truth_model = double(model)
    truth = plain_llama.logits(truth_model, ids)
    (truth * torch.sin(torch.arange(truth.numel())).view(truth.shape).double()).sum().backward()
    assert rel_err(logits, truth) < 2e-6
    assert {n for n, _ in model.named_parameters()} == set(grads)
    scalars = ([], [])
    for name, p in truth_model.named_parameters():
        assert p.grad.norm() > 0, name
        if p.dim() == 1 and "laurel_" in name:
            scalars[0].append(grads[name])
            scalars[1].append(p.grad)
        else:
            assert rel_err(grads[name], p.grad) < 1e-5, name
    # One alone may be a difference of large sums.
    if scalars[0]:
        assert rel_err(torch.cat(scalars[0]), torch.cat(scalars[1])) < 1e-5


@pytest.mark.parametrize("variant", ["pa-id", "rw+lr+pa"])
@pytest.mark.parametrize("look_back", [1, 2, 7])
def test_how_far_residuals_look_back(variant, look_back):
    model, ids = changed(variant, look_back=look_back), tokens()
    residuals = [m for m in model.modules() if isinstance(m, LaurelResidual)]
    assert [r.num_previous for r in residuals] == [min(i, look_back - 1) for i in range(8)]
    assert rel_err(step(model, ids)[0], plain_llama.logits(double(model), ids)) < 2e-6
    with torch.no_grad():
        assert rel_err(model(input_ids=ids).logits, plain_llama.logits(double(model), ids)) < 2e-6


def test_x0_is_the_first_hidden_state():
    """With one layer of which nothing but the last residual counts: logits are linear in the factor of x0."""
    model, ids = apply_laurel(decoder("Llama"), "rw", x0=True, placement="block"), tokens()
    seen = {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, (a[0], out)))
    with torch.no_grad():
        model(input_ids=ids)
        before = seen[3]
        model.model.layers[3].laurel_block.x0_weight.fill_(0.75)
        model(input_ids=ids)
    want = before[1].double() + 0.75 * model.model.embed_tokens(ids).double()
    assert torch.equal(seen[3][0], before[0])
    assert rel_err(seen[3][1], want) < 1e-6


@pytest.mark.parametrize("options", [{}, {"per_channel": True, "scalar_map": "sigmoid"}, {"placement": "attn"}])
def test_state_dict_goes_round(options, tmp_path):
    model, ids = changed("rw+lr+pa", **options), tokens()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = apply_laurel(decoder("Llama"), "rw+lr+pa", rank=4, **options)
    assert rel_err(fresh(input_ids=ids).logits, model(input_ids=ids).logits.double()) > 1e-2
    fresh.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)
    assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("variant", ["rw+lr", "rw+pa"])
def test_removal_restores_everything(variant):
    model, ids = decoder("Qwen3"), tokens()
    keys, want = list(model.state_dict()), model(input_ids=ids).logits
    attributes = [(type(m), set(vars(m)), set(m._modules)) for m in model.modules()]
    shaken(apply_laurel(model, variant, rank=4), "laurel_")
    assert rel_err(model(input_ids=ids).logits, want.double()) > 1e-2
    assert remove_laurel(model) is model
    assert list(model.state_dict()) == keys
    assert torch.equal(model(input_ids=ids).logits, want)
    assert [(type(m), set(vars(m)), set(m._modules)) for m in model.modules()] == attributes
    assert not model.model._forward_pre_hooks
    apply_laurel(model, variant)


@pytest.mark.parametrize("variant", ["rw+lr", "pa-id", "rw+lr+pa"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_generation_with_and_without_a_cache(family, variant):
    model = changed(variant, family, x0=True)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ids = tokens(2, 5)
    fast = model.generate(ids, **options, use_cache=True)
    slow = model.generate(ids, **options, use_cache=False)
    assert fast.sequences.shape == (2, 13)
    assert torch.equal(fast.sequences, slow.sequences)
    assert rel_err(torch.stack(fast.logits), torch.stack(slow.logits).double()) < 1e-5


@pytest.mark.parametrize("variant", ["rw+lr", "pa-id", "pa-shared", "rw+lr+pa"])
def test_gradient_checkpointing(variant):
    """The default of transformers: every gradient of the plain run, twice over, by the same forward."""
    model, ids = changed(variant, x0=True).train(), tokens()
    want, want_grads = step(model, ids)
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *a: calls.append(1))
    got, grads = step(model, ids)
    assert len(calls) == 2
    assert torch.equal(got, want)
    assert set(grads) == set(want_grads)
    for name, grad in want_grads.items():
        assert torch.equal(grads[name], grad), name


def test_reentrant_checkpointing():
    """Right where layers exchange hidden states alone, refused where they do not."""
    model, ids = changed("rw+lr").train(), tokens()
    want, want_grads = step(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    got, grads = step(model, ids)
    assert torch.equal(got, want)
    for name, grad in want_grads.items():
        assert torch.equal(grads[name], grad), name
    for options in ({"variant": "pa-id"}, {"variant": "rw", "x0": True}):
        model = changed(**options).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(NotImplementedError, match="gradient checkpointing must be use_reentrant=False"):
            step(model, ids)
        with torch.no_grad():
            want = model(input_ids=ids).logits
        assert torch.equal(model.eval()(input_ids=ids).logits, want)


def test_hidden_states_and_attentions_are_recorded():
    model, ids = changed("rw+lr+pa"), tokens()
    out = model(input_ids=ids, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    last = model.model.layers[3](out.hidden_states[3], **context_of(model, ids))
    assert torch.equal(model.model.norm(last), out.hidden_states[4])


def context_of(model, ids):
    """Arguments of the last layer in a pass over `ids`."""
    seen = {}
    hook = model.model.layers[3].register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    with torch.enable_grad():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    return seen


@pytest.mark.parametrize(("placement", "called"), [("both", 0), ("attn", 0), ("ffn", 4), ("block", 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_behind_attention_is_fused(family, placement, called, monkeypatch):
    model, ids = changed(family=family, placement=placement), tokens()
    layers = model.model.layers
    name = "pre_feedforward_layernorm" if family in ("Gemma2", "Gemma3") else "post_attention_layernorm"
    norms, calls = [getattr(layer, name) for layer in layers], []
    forward = type(norms[0]).forward
    monkeypatch.setattr(type(norms[0]), "forward", lambda self, x: calls.append(self) or forward(self, x))
    model(input_ids=ids)
    assert sum(any(c is n for n in norms) for c in calls) == called


def test_a_forward_left_behind_is_taken_along():
    """What recording outputs does to a layer in transformers 5.0: its own method becomes its attribute."""
    model, ids = decoder("Llama"), tokens()
    want = model(input_ids=ids).logits
    for change in (lambda m: apply_laurel(m, "rw+lr", rank=4), remove_laurel):
        for layer in model.model.layers:
            layer.forward = layer.forward
        change(model)
        assert not any("forward" in vars(layer) for layer in model.model.layers)
        assert rel_err(model(input_ids=ids).logits, want.double()) < 2e-6


def test_other_heads_and_none():
    """The base model, another head, and a text decoder beside an image encoder, all with history."""
    config = decoder("Llama").config
    text = decoder("Gemma3").config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    both = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_id=3
    )
    ids = tokens()
    for model in (
        transformers.LlamaModel(config),
        transformers.LlamaForSequenceClassification(config),
        transformers.Gemma3ForConditionalGeneration(both),
    ):
        model.eval()
        want = model(input_ids=ids)[0]
        apply_laurel(model, "rw+lr+pa", rank=4, x0=True)
        assert rel_err(model(input_ids=ids)[0], want.double()) < 2e-6
        shaken(model, "laurel_")
        assert rel_err(model(input_ids=ids)[0], want.double()) > 1e-2
        assert torch.equal(remove_laurel(model)(input_ids=ids)[0], want)


def test_a_norm_with_a_hook_or_another_class_is_called():
    model, ids = changed(), tokens()
    want = model(input_ids=ids).logits
    seen = []
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda m, a, out: seen.append(out))
    got = model(input_ids=ids).logits
    assert len(seen) == 1
    assert rel_err(got, want.double()) < 1e-6

    class Doubled(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm, self.weight = norm, norm.weight

        def forward(self, x):
            return 2.0 * self.norm(x)

    layer = model.model.layers[2]
    layer.post_attention_layernorm = Doubled(layer.post_attention_layernorm)
    got = model(input_ids=ids).logits
    layer.post_attention_layernorm = layer.post_attention_layernorm.norm
    with torch.no_grad():
        layer.post_attention_layernorm.weight *= 2.0
    assert rel_err(got, model(input_ids=ids).logits.double()) < 1e-6


def test_a_pickled_model_computes_the_same():
    """To and from bytes that this test made itself: the swapped classes are found again."""
    model = shaken(changed())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    ids = tokens()
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    assert type(twin.model.layers[0]) is type(model.model.layers[0])


def test_copies_are_independent():
    model, ids = changed("pa-shared"), tokens()
    other = copy.deepcopy(model)
    want = model(input_ids=ids).logits
    assert torch.equal(other(input_ids=ids).logits, want)
    remove_laurel(other)
    assert torch.equal(model(input_ids=ids).logits, want)


@pytest.mark.parametrize("variant", ["rw+lr", "rw+lr+pa"])
def test_compiles_without_a_break(variant):
    model, ids = changed(variant, num_layers=2, x0=True), tokens()
    want, want_grads = step(model, ids)
    got, grads = step(torch.compile(model, backend="aot_eager", fullgraph=True), ids)
    assert rel_err(got, want.double()) < 1e-6
    for name, grad in want_grads.items():
        assert rel_err(grads["_orig_mod." + name], grad.double()) < 1e-5, name


def test_a_layer_alone_has_no_history():
    model, ids = changed("pa-id"), tokens()
    arguments = context_of(model, ids)
    x = torch.randn(2, 9, 32)
    arguments.pop("laurel_context")
    with pytest.raises(RuntimeError, match="a layer of this variant must be called by its model"):
        model.model.layers[3](x, **arguments)


def test_errors():
    model = decoder("Llama")
    for options, rule in (
        ({"variant": "wr"}, "variant must be one of"),
        ({"placement": "mlp"}, "placement must be one of .*, got 'mlp'"),
        ({"look_back": 0}, "look_back must be at least 1, got 0"),
        ({"rank": 33}, r"rank must lie in \[1, D=32\], got 33"),
        ({"init": "zeros"}, "init must be"),
    ):
        with pytest.raises(ValueError, match=rule):
            apply_laurel(model, **options)
        assert not any("laurel" in name for name, _ in model.named_modules())
    with pytest.raises(ValueError, match="remove_laurel: model must be one that apply_laurel was applied to"):
        remove_laurel(model)
    apply_laurel(model, rank=4)
    with pytest.raises(ValueError, match="model must be unchanged"):
        apply_laurel(model, rank=4)
    remove_laurel(model)
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match=r"layers\[1\] must have its class's forward"):
        apply_laurel(model, rank=4)
    with pytest.raises(ValueError, match="Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2, Gemma3, got Sequential with 0"):
        apply_laurel(torch.nn.Sequential())
