"""A looped decoder written out: one sequence, one loop, one head, one query at a time, and no cache but a dictionary.

Everything that any loop ever computed of a token stays in it; the policy is only asked which loop to look at.
"""

import math

import torch

from effkern.models.looped import LoopedStage, position_noise
from effkern.models.stages import parse_stages


def source(policy, loop, ran, near):
    """The loop of a token of an earlier pass that `loop` reads, if the token ran `ran` loops."""
    kind, size = policy.kind, policy.size
    if kind == "full":
        return loop
    if kind == "latest-available" or (kind == "window" and near):
        return min(loop, ran - 1)
    if kind == "cyclic":
        same = [t for t in range(ran) if t % size == loop % size]
        return same[-1] if same else ran - 1
    if kind == "block":
        same = [t for t in range(ran) if t // size == loop // size]
        return same[-1] if same else ran - 1
    return ran - 1


class SlowDecoder:
    """One sequence of `model`."""

    def __init__(self, model, policy, loops=None):
        self.model, self.policy, self.config = model, policy, model.config
        self.stages = model.stages(loops)
        self.store, self.ran, self.length = {}, {}, 0
        # h_1, h_2 ... of the last pass, by stage.
        self.states = {}

    def run(self, tokens, ran=None):
        """Hidden states of new positions; `ran`: the loops of each looped stage in this pass."""
        c = self.config
        looped = [i for i, stage in enumerate(parse_stages(c.loop.stages)) if stage.looped]
        ran = dict(zip(looped, ran if ran is not None else [self.stages[i].loops for i in looped]))
        self.now = range(self.length, self.length + len(tokens))
        x = self.model.embedding.weight[torch.tensor(tokens)]
        for i, module in enumerate(self.model.stack.stages):
            if isinstance(module, LoopedStage):
                x = self.looped_stage(i, module, x, ran[i])
            else:
                for j, layer in enumerate(module.blocks):
                    x = self.layer((i, 0, j), layer, x)
            for position in self.now:
                self.ran[i, position] = ran.get(i, 1)
        self.length += len(tokens)
        return self.norm(x, self.model.norm.weight)

    def looped_stage(self, i, module, e, ran):
        block, loop, total = module.block, self.config.loop, self.stages[i].loops
        h = {
            "input": lambda: e,
            "zeros": lambda: torch.zeros_like(e),
            "learned": lambda: block.start_state.vector.expand_as(e),
            "noise": lambda: torch.stack([position_noise(p, e.shape[1]) for p in self.now]).to(e),
        }[loop.init]()
        self.states[i] = []
        for t in range(ran):
            x = self.inject(block.injection, loop.injection, h, e)
            rows = block.conditioning.rows(total, None, e)
            if rows is not None:
                x = x + rows[t]
            z = x
            for j, layer in enumerate(block.core):
                if loop.layer_scalars == "stream":
                    a, b = block.layer_scalars.table[t, j]
                    z = a.double() * z + b.double() * e
                out = self.layer((i, t, j), layer, z)
                if loop.layer_scalars == "increment":
                    out = z + block.layer_scalars.table[t, j].double() * (out - z)
                z = out
            h = self.residual(block.residual, loop, z, h, total)
            if loop.norm:
                h = self.norm(h, block.norm.weight)
            self.states[i].append(h)
        return h

    @staticmethod
    def inject(part, kind, h, e):
        if kind == "add":
            return h + e
        if kind == "linear":
            return torch.cat((h, e), -1) @ part.adapter.weight.T
        if kind == "gate":
            return part.state_scale * h + part.input_scale * e
        if kind == "convex":
            g = 1 / (1 + torch.exp(-part.gate.double()))
            return g * h + (1 - g) * e
        return h

    @staticmethod
    def residual(part, loop, f, h, total):
        if loop.residual == "euler":
            return h + (f - h) / total
        if loop.residual == "laurel":
            f = part.alpha * f + part.beta * h
            return f if part.low_rank is None else f + h @ part.low_rank.down @ part.low_rank.up
        return f

    def norm(self, x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * weight

    def layer(self, place, layer, x):
        x = x + self.attention(place, layer.attention, self.norm(x, layer.attention_norm.weight))
        gate, up = (self.norm(x, layer.mlp_norm.weight) @ layer.mlp.gate_up.weight.T).chunk(2, -1)
        return x + (gate * gate.sigmoid() * up) @ layer.mlp.down.weight.T

    def attention(self, place, attention, x):
        c, dim = self.config, self.config.head_size
        heads = (x @ attention.qkv.weight.T).split(dim, dim=-1)
        groups, out = c.num_heads // c.num_kv_heads, []
        for n, position in enumerate(self.now):
            for g in range(c.num_kv_heads):
                key = self.rotate(heads[c.num_heads + g][n], position)
                self.store[(*place, g, position)] = key, heads[c.num_heads + c.num_kv_heads + g][n]
        for n, position in enumerate(self.now):
            mixed = []
            for head in range(c.num_heads):
                query = self.rotate(heads[head][n], position)
                keys, values = zip(*(self.seen(place, head // groups, p) for p in range(position + 1)))
                weights = (torch.stack(keys) @ query / math.sqrt(dim)).softmax(0)
                mixed.append(weights @ torch.stack(values))
            out.append(torch.cat(mixed))
        return torch.stack(out) @ attention.out.weight.T

    def seen(self, place, group, position):
        """Key and value of a position for the loop of `place`."""
        stage, loop, layer = place
        if position < self.now.start:
            near = position >= self.now.start - self.policy.size
            if self.stages[stage].loops > 1:
                loop = source(self.policy, loop, self.ran[stage, position], near)
        return self.store[stage, loop, layer, group, position]

    def rotate(self, v, position):
        half = self.config.head_size // 2
        angle = position * self.config.rope_theta ** (-torch.arange(half).double() * 2 / self.config.head_size)
        turned = torch.complex(v[:half], v[half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag))
