"""The looped decoder: notation, sizes from the formula, tied weights written out, gradients, drawn loops."""

import copy
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from effkern.models import (
    Decoder,
    DecoderConfig,
    LaurelConfig,
    LoopConfig,
    PlainStack,
    Stage,
    count_parameters,
    forward_flops,
    generate,
    parse_stages,
)
from effkern.models.looped import LoopedStage
from effkern.nn import LaurelResidual
from effkern.train.mapping import overlay
from effkern.train.optimizer import split_decay
from tests.models.loop_models import BASE, looped, noisy

EVERY_PART = (
    looped(),
    looped("2x3"),
    looped("1x2,1x1,2x5", injection="linear", init="learned", norm=True, conditioning="sinusoidal"),
    looped(injection="gate", residual="laurel", rank=3, conditioning="table", layer_scalars="stream"),
    looped(injection="convex", residual="laurel", conditioning="time", layer_scalars="increment", exit_gate=True),
    looped(injection="add", init="noise", residual="euler", sample="uniform", conditioning="table"),
    looped(sample="poisson", max_loops=9, layer_scalars="increment"),
    replace(looped(), residual="laurel", laurel=LaurelConfig("rw+lr", 3)),
)


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("4x1,4x4,4x1", ((4, 1), (4, 4), (4, 1))),
        ("1x12", ((1, 12),)),
        (" 2 x 3 , 10x1,3x2 ", ((2, 3), (10, 1), (3, 2))),
    ],
)
def test_notation(text, stages):
    assert parse_stages(text) == tuple(Stage(*stage) for stage in stages)


@pytest.mark.parametrize("text", ["4", "4x", "x4", "4x4;2x1", "4x1,", "-1x2", "4x4x4", "1.5x2"])
def test_notation_errors(text):
    with pytest.raises(ValueError, match="stages: each must be LAYERSxLOOPS as in '4x1,4x4,4x1', got"):
        parse_stages(text)
    with pytest.raises(ValueError, match=r"stages: layers and loops must be at least 1, got '0x3' in '1x1,0x3'"):
        parse_stages("1x1,0x3")
    for absurd in ("1x99999999999999999999", "2147483648x2"):
        with pytest.raises(ValueError, match=f"layers and loops must be at most 2147483647, got '{absurd}'"):
            LoopConfig(absurd)
    assert parse_stages("1x2147483647") == (Stage(1, 2147483647),)


@pytest.mark.parametrize("config", EVERY_PART)
def test_count_parameters_is_the_models(config):
    assert count_parameters(config) == sum(p.numel() for p in Decoder(config).parameters())


def test_loops_cost_no_parameters_and_a_full_pass_each():
    plain = replace(BASE, stack="plain", loop=LoopConfig())
    config = looped("1x1,1x6,1x1")
    assert count_parameters(config) == count_parameters(plain)
    assert (plain.depth, config.depth) == (3, 8)
    one, eight = forward_flops(plain, 12), forward_flops(config, 12)
    assert eight.blocks == pytest.approx(one.blocks * 8 / 3, rel=1e-12)
    assert eight.attention == pytest.approx(one.attention * 8 / 3, rel=1e-12)
    assert eight.head == one.head


@pytest.mark.parametrize("config", [EVERY_PART[1], EVERY_PART[2], looped(norm=True)])
def test_flops_are_those_of_the_products_that_run(config):
    model, tokens = Decoder(config).eval().requires_grad_(False), torch.randint(0, 37, (2, 10))
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "mm" in str(op)) / tokens.numel()
    # Left out by the counter: weights of norms, which the formula takes for products.
    norms = 2 * 2 * config.hidden_size * config.depth
    norms += 2 * config.hidden_size * sum(s.loops for s in model.stages() if s.looped) * config.loop.norm
    # And by the formula: what a call computes once for a loop, and not for a token.
    once = 2 * sum(s.loops * 64 * 16 for s in model.stages() if s.looped) * (config.loop.conditioning == "sinusoidal")
    assert forward_flops(config, 10).blocks == pytest.approx(products - once / tokens.numel() + norms, rel=1e-12)


def test_flops_of_a_low_rank_residual():
    """h A B in every loop, inside of effkern.loop_step."""
    with_rank, without = (forward_flops(looped(residual="laurel", rank=r), 10, loops=5).blocks for r in (3, 0))
    assert with_rank - without == 5 * 2 * (2 * 16 * 3)


def unrolled(model):
    """A plain decoder whose blocks are those of a looped one without glue, in the order in which they run."""
    config = replace(model.config, stack="plain", loop=LoopConfig(), num_layers=model.config.depth)
    plain = Decoder(config, dtype=torch.float64)
    order = []
    for module in model.stack.stages:
        looped = isinstance(module, LoopedStage)
        order += list(module.block.core) * module.stage.loops if looped else list(module.blocks)
    for i, layer in enumerate(order):
        block = plain.stack.blocks[i]
        for name, p in layer.named_parameters():
            *path, leaf = name.split(".")
            owner = block
            for part in path:
                owner = getattr(owner, part)
            owner._parameters[leaf] = p
    for name in ("embedding", "norm"):
        getattr(plain, name)._parameters["weight"] = getattr(model, name).weight
    return plain


def gradients(model, tokens, **kwargs):
    """The hidden states, and the gradient of a fixed sum of them by every parameter."""
    for p in model.parameters():
        p.grad = None
    hidden = model(tokens, **kwargs)
    (hidden * torch.cos(torch.arange(hidden.numel()).view(hidden.shape))).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["recompute", "full", "recompute_layer", "autograd"])
@pytest.mark.parametrize("stages", ["2x4", "1x1,2x3,1x1", "1x2,1x1,1x3"])
@pytest.mark.parametrize("residual", ["add", "laurel"])
def test_it_is_the_unrolled_stack_with_tied_weights(mode, stages, residual):
    config = replace(looped(stages, mode=mode), residual=residual, laurel=LaurelConfig("rw+lr", 3))
    model, tokens = noisy(config, size=0.2).train(), torch.randint(0, 37, (2, 9))
    found, grads = gradients(model, tokens)
    want, _ = gradients(unrolled(model), tokens)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-10)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-8, atol=1e-8, msg=name)
    assert torch.equal(generate(model, tokens, 6), generate(unrolled(model), tokens, 6))


@pytest.mark.parametrize("config", EVERY_PART[2:])
def test_every_mode_has_the_gradient_of_autograd(config):
    model, tokens = noisy(config, size=0.2).train(), torch.randint(0, 37, (2, 9))
    found = {}
    for mode in ("autograd", "recompute", "full", "recompute_layer"):
        for stage in model.stack.stages:
            if isinstance(stage, LoopedStage):
                stage.block.mode = mode
        torch.manual_seed(0)
        found[mode] = gradients(model, tokens, step=4)
    want, want_grads = found["autograd"]
    assert {n for n, _ in model.named_parameters()} - set(want_grads) <= {n for n in model.state_dict() if "gate" in n}
    for mode in ("recompute", "full", "recompute_layer"):
        hidden, grads = found[mode]
        torch.testing.assert_close(hidden, want, rtol=1e-10, atol=1e-10)
        assert grads.keys() == want_grads.keys()
        for name, grad in want_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("injection", ["none", "add", "linear", "gate"])
def test_truncation_is_a_detached_state(injection):
    """Gradients of the last two of four loops, as if h_2 came from nowhere."""
    full = noisy(looped("1x1,2x4,1x1", injection=injection)).train()
    model = noisy(looped("1x1,2x4,1x1", injection=injection, mode="truncated", gradient_loops=2)).train()
    tokens = torch.randint(0, 37, (2, 7))
    found, grads = gradients(model, tokens)
    block = full.stack.stages[1].block

    def cut(x, rope, **kwargs):
        at = block.start(x)
        for t in range(4):
            at = block.advance(at, rope, loops=4)
            if t == 1:
                at = at._replace(state=at.state.detach())
        return at.state

    full.stack.stages[1].block.forward = cut
    want, want_grads = gradients(full, tokens)
    torch.testing.assert_close(found, want)
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("sample", ["uniform", "poisson"])
def test_drawn_loops_are_functions_of_seed_stage_and_step(sample):
    config = looped("1x3,1x1,1x3", sample=sample)
    tokens = torch.randint(0, 37, (1, 4))

    def counts(seed, steps):
        model, seen = Decoder(config, seed=seed), []
        model.train()
        for stage in model.stack.stages[::2]:
            core = stage.block.core[0]
            core.register_forward_hook(lambda *a, seen=seen, core=core: seen.append(id(core)))
        rows = []
        for step in steps:
            seen.clear()
            with torch.no_grad():
                model(tokens, step=step)
            rows.append([seen.count(id(stage.block.core[0])) for stage in model.stack.stages[::2]])
        return rows

    first = counts(0, range(12))
    torch.manual_seed(123)
    assert first == counts(0, range(12))
    assert first[5:] == counts(0, range(5, 12))
    assert first != counts(1, range(12))
    assert [a for a, _ in first] != [b for _, b in first]
    assert len({a for a, _ in first}) > 2
    model = Decoder(config).train()
    with pytest.raises(ValueError, match="step must be given in training, as loops are drawn from it, got None"):
        model(tokens)
    # Evaluation and calls with loops draw nothing.
    assert torch.equal(model(tokens, loops=3), model.eval()(tokens))


def test_noise_of_evaluation_belongs_to_the_position():
    model, tokens = noisy(looped(init="noise")), torch.randint(0, 37, (2, 9))
    first = model(tokens)
    state = torch.get_rng_state()
    assert torch.equal(first, model(tokens))
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(first[:, :4], model(tokens[:, :4]))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_scalars_and_tables_get_no_weight_decay():
    config = looped(injection="linear", residual="laurel", rank=3, conditioning="table", layer_scalars="stream")
    model = Decoder(config)
    decayed, plain = split_decay(model)
    assert len(decayed) + len(plain) == len(list(model.parameters()))
    names = {id(p): n.split("block.", 1)[-1] for n, p in model.named_parameters() if ".block." in n}
    own = {names[id(p)] for p in plain if id(p) in names and "core" not in names[id(p)]}
    assert own == {"conditioning.table", "layer_scalars.table", "residual.alpha", "residual.beta"}
    own = {names[id(p)] for p in decayed if id(p) in names and "core" not in names[id(p)]}
    assert own == {"injection.adapter.weight", "residual.low_rank.down", "residual.low_rank.up"}


def test_init_depends_on_seed_alone():
    torch.manual_seed(1)
    first, state = Decoder(EVERY_PART[2], seed=5), torch.get_rng_state()
    torch.manual_seed(2)
    second = Decoder(EVERY_PART[2], seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    torch.manual_seed(1)
    Decoder(EVERY_PART[2], seed=6)
    assert torch.equal(torch.get_rng_state(), state)


def test_compiled_layers_do_not_compile_again_for_other_loops():
    model, tokens = Decoder(looped("1x1,1x3,1x1", injection="add")).train(), torch.randint(0, 37, (2, 9))
    want, want_grads = gradients(copy.deepcopy(model), tokens, loops=5)
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    for module in model.stack.modules():
        if type(module).__name__ == "Layer":
            module.compile(fullgraph=True, backend=backend)
    gradients(model, tokens, loops=3)
    count = len(seen)
    found, grads = gradients(model, tokens, loops=5)
    assert len(seen) == count > 0
    torch.testing.assert_close(found, want)
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_laurel_runs_in_loops_where_it_reads_nothing_of_earlier_ones():
    for variant in ("rw", "lr", "rw+lr"):
        config = replace(looped(), residual="laurel", laurel=LaurelConfig(variant, 3, "block"))
        model = Decoder(config)
        assert sum(isinstance(m, LaurelResidual) for m in model.modules()) == 3
        assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    for laurel in (LaurelConfig("pa-id"), LaurelConfig("rw+lr+pa", 3), LaurelConfig("rw", x0=True)):
        with pytest.raises(ValueError, match=r"laurel.variant must be 'rw', 'lr' or 'rw\+lr', without x0, for stack"):
            replace(looped(), residual="laurel", laurel=laurel)


def test_a_config_from_before_loops_still_loads():
    stored = asdict(DecoderConfig(num_layers=2))
    del stored["loop"]
    config = overlay(DecoderConfig(), stored)
    assert config == DecoderConfig(num_layers=2)
    assert isinstance(Decoder(config).stack, PlainStack)
    new = looped(injection="add", sample="uniform")
    assert overlay(DecoderConfig(), asdict(new)) == new


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": "1x1,2x1"}, "LoopConfig: stages must have a stage of several loops, got '1x1,2x1'"),
        ({"injection": "concat"}, r"LoopConfig: injection must be one of .*, got 'concat'"),
        ({"init": "ones"}, "LoopConfig: init must be one of"),
        ({"conditioning": "film"}, "LoopConfig: conditioning must be one of"),
        ({"residual": "add"}, "LoopConfig: residual must be one of"),
        ({"mode": "implicit"}, "LoopConfig: mode must be one of"),
        ({"sample": "normal"}, "LoopConfig: sample must be one of"),
        ({"layer_scalars": "argument"}, "LoopConfig: layer_scalars must be one of"),
        ({"rank": 3}, 'LoopConfig: rank must be 0 without residual = "laurel", got 3'),
        ({"mode": "truncated"}, "LoopConfig: gradient_loops must be at least 1"),
        ({"gradient_loops": 2}, 'LoopConfig: mode must be "truncated" for gradient_loops = 2'),
        ({"mode": "truncated", "gradient_loops": 5}, "gradient_loops must be at most 4 loops, got 5"),
        ({"max_loops": 3}, "LoopConfig: max_loops must be at least 4 loops, got 3"),
        ({"sample": "poisson", "conditioning": "table"}, "max_loops must be given for tables with sample"),
        ({"sigma": -1.0}, r"LoopConfig: sigma must lie in \[0, 10\], got -1.0"),
        ({"residual": "laurel", "rank": 17}, "DecoderConfig: loop.rank must be at most hidden_size=16, got 17"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        looped(**options)


def test_errors_of_the_stack():
    with pytest.raises(ValueError, match=r"num_layers must be 12, the layers of loop\.stages='4x1,4x4,4x1', got 3"):
        replace(BASE, loop=LoopConfig("4x1,4x4,4x1"))
    with pytest.raises(ValueError, match=r"loop\.stages must be given for stack='looped'"):
        replace(BASE, loop=LoopConfig())
    with pytest.raises(ValueError, match="stack must be 'looped' where loop is given, got 'plain'"):
        replace(BASE, stack="plain")
    with pytest.raises(TypeError, match="loop must be a LoopConfig, got '1x4'"):
        replace(BASE, loop="1x4")
    model, tokens = Decoder(looped("1x2,1x3")).eval(), torch.zeros(1, 2, dtype=torch.int64)
    for loops, kind, message in (
        (0, ValueError, "loops must be at least 1, got 0"),
        ([2], ValueError, "loops must be one number, or one for each of 2 stages"),
        ([2, 1.5], TypeError, "loops must be whole numbers"),
    ):
        with pytest.raises(kind, match="Decoder: " + message):
            model(tokens, loops=loops)
    with pytest.raises(ValueError, match="loops must be at most max_loops=4, got 5"):
        Decoder(looped(conditioning="table"))(tokens, loops=5)
