"""Shampoo's step written out once more, parameter by parameter and block by block, in float64."""

import math

import torch


def pieces(size, limit):
    count = math.ceil(size / limit)
    length = math.ceil(size / count)
    return [slice(start, min(size, start + length)) for start in range(0, size, length)]


def power(matrix, exponent, ridge, tolerance):
    values, vectors = torch.linalg.eigh(matrix)
    top = values.max()
    if tolerance is not None:
        kept = values > tolerance * top
        changed = torch.where(kept, (values.clamp_min(0) + ridge * top) ** -exponent, 0.0)
    else:
        changed = (values.clamp_min(0) + ridge * top) ** -exponent
    return vectors @ torch.diag(changed) @ vectors.T


def is_due(frequency, start, t):
    if t < start:
        return False
    if not isinstance(frequency, int):
        frequency = [every for first, every in frequency if first <= t][-1]
    return t == start or t % frequency == 0


class Literal:
    """One matrix parameter, kept as [rows, columns] in float64."""

    def __init__(self, weight, o):
        self.o, self.shape, self.t = o, weight.shape, 0
        self.w = weight.double().reshape(weight.shape[0], -1).clone()
        m, n = self.w.shape
        side = o["side"] if o["side"] != "auto" else ("left" if m <= n else "right")
        self.left, self.right = side != "right", side != "left"
        e = o["exponents"]
        if e is None:
            e = 0.5 if side != "both" or o["accumulation"] == "kl" else 0.25
        self.a, self.b = e if isinstance(e, tuple) else (e, e)
        rows = pieces(m, o["block_size"]) if self.left else [slice(0, m)]
        cols = pieces(n, o["block_size"]) if self.right else [slice(0, n)]
        self.blocks = [(r, c) for r in rows for c in cols]
        self.state = []
        for r, c in self.blocks:
            p, q = self.w[r, c].shape
            zero = torch.zeros(p, q, dtype=torch.float64)
            self.state.append(
                {"L": torch.zeros(p, p).double(), "R": torch.zeros(q, q).double(), "Lr": torch.eye(p).double(),
                 "Rr": torch.eye(q).double(), "M": zero, "V": zero}
            )  # fmt: skip

    def step(self, grad):
        self.t += 1
        grad = grad.double().reshape(grad.shape[0], -1)
        for (r, c), s in zip(self.blocks, self.state):
            self.w[r, c] = self.block(self.w[r, c], grad[r, c], s)

    def block(self, w, g, s):
        o, t = self.o, self.t
        (beta1, beta2), graft = o["betas"], o["adamw_betas"][1]
        kind = o["accumulation"]
        left_term, right_term = g @ g.T, g.T @ g
        if kind == "kl":
            left_term = g @ s["Rr"] @ s["Rr"] @ g.T / g.shape[1]
            right_term = g.T @ s["Lr"] @ s["Lr"] @ g / g.shape[0]
        for name, term in (("L", left_term), ("R", right_term)):
            if kind == "sum":
                s[name] = s[name] + term
            elif kind == "weighted":
                s[name] = beta2 * s[name] + term
            else:
                s[name] = beta2 * s[name] + (1 - beta2) * term
        if is_due(o["precondition_frequency"], o["start_step"], t):
            fix = 1 / (1 - beta2**t) if o["bias_correction"] and kind in ("ema", "kl") else 1.0
            if self.left:
                s["Lr"] = power(fix * s["L"], self.a, o["ridge"], o["pseudo_inverse"])
            if self.right:
                s["Rr"] = power(fix * s["R"], self.b, o["ridge"], o["pseudo_inverse"])
        s["M"] = beta1 * s["M"] + (1 - beta1) * g
        m = s["M"] / (1 - beta1**t) if o["bias_correction"] else s["M"]
        other = m
        if o["grafting"] == "adagrad":
            s["V"] = s["V"] + g**2
        elif o["grafting"] in ("rmsprop", "adam"):
            s["V"] = graft * s["V"] + (1 - graft) * g**2
        if o["grafting"] in ("adagrad", "rmsprop", "adam"):
            v = s["V"] / (1 - graft**t) if o["grafting"] == "adam" else s["V"]
            other = m / (v.sqrt() + o["eps"])
        if o["grafting"] == "rms":
            other = m / m.norm() * o["graft_scale"] * math.sqrt(g.numel())
        u = other
        if t >= o["start_step"]:
            u = s["Lr"] @ m if self.left else m
            u = u @ s["Rr"] if self.right else u
            if o["grafting"] != "none":
                u = u / u.norm() * other.norm()
        return w - o["lr"] * o["weight_decay"] * w - o["lr"] * u


class LiteralAdamW:
    def __init__(self, weight, o):
        self.o, self.w, self.t = o, weight.double().clone(), 0
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)

    def step(self, grad):
        self.t += 1
        beta1, beta2 = self.o["adamw_betas"]
        self.m = beta1 * self.m + (1 - beta1) * grad.double()
        self.v = beta2 * self.v + (1 - beta2) * grad.double() ** 2
        move = (self.m / (1 - beta1**self.t)) / ((self.v / (1 - beta2**self.t)).sqrt() + self.o["eps"])
        self.w = self.w * (1 - self.o["lr"] * self.o["weight_decay"]) - self.o["lr"] * move
