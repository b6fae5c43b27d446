"""The reference trainer's models and methods as one writes them in plain torch: what end_to_end compares with.

Nothing of this package is used but its initial weights, data order and learning rate, so that both sides train the same
model on the same tokens. One compiled function holds model, output layer, loss and teacher; AdamW is fused.
"""

from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.models import Decoder, DecoderConfig, parse_stages
from effkern.train.config import TrainConfig
from effkern.train.schedules import learning_rate


class Residual(nn.Module):
    """alpha f + beta (x + x A B), (alpha, beta) = 2 softmax(weights); or x + f."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.learned = config.residual == "laurel"
        if self.learned:
            self.weights = nn.Parameter(torch.zeros(2))
            self.down = nn.Parameter(torch.zeros(config.hidden_size, config.laurel.rank))
            self.up = nn.Parameter(torch.zeros(config.laurel.rank, config.hidden_size))

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        if not self.learned:
            return x + f
        alpha, beta = 2 * self.weights.softmax(0)
        return alpha * f + beta * (x + (x @ self.down) @ self.up)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv, self.size = config.num_heads, config.num_kv_heads, config.head_size
        width = config.hidden_size
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv) * self.size, bias=False)
        self.out = nn.Linear(self.heads * self.size, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        every = self.qkv(x).view(batch, length, -1, self.size).transpose(1, 2)
        turned, v = every[:, : -self.kv], every[:, -self.kv :]
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        q, k = turned[:, : self.heads], turned[:, self.heads :]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class Mlp(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """Parameters in the order of the package's own block."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        self.attention_norm, self.attention = nn.RMSNorm(width, eps), Attention(config)
        self.attention_residual = Residual(config)
        self.mlp_norm, self.mlp = nn.RMSNorm(width, eps), Mlp(config)
        self.mlp_residual = Residual(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.attention_residual(x, self.attention(self.attention_norm(x), cos, sin))
        return self.mlp_residual(x, self.mlp(self.mlp_norm(x)))


class PlainDecoder(nn.Module):
    """tokens [B, T] -> hidden states [B, T, d]; the head is the embedding."""

    def __init__(self, like: Decoder, length: int) -> None:
        super().__init__()
        config = like.config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        first, self.order = 0, list[int]()
        stages = [(s.layers, s.loops) for s in parse_stages(config.loop.stages)] if config.stack == "looped" else []
        for count, loops in stages or [(config.num_layers, 1)]:
            self.order += list(range(first, first + count)) * loops
            first += count
        rate = config.rope_theta ** (-torch.arange(0, config.head_size, 2) / config.head_size)
        angles = torch.arange(length)[:, None] * rate
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        mine, theirs = list(self.parameters()), list(like.parameters())
        if [p.shape for p in mine] != [p.shape for p in theirs]:
            raise ValueError("end_to_end: the plain decoder must have the parameters of the package's, in their order")
        with torch.no_grad():
            for p, q in zip(mine, theirs):
                p.copy_(q)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for index in self.order:
            x = self.layers[index](x, self.cos, self.sin)
        return self.norm(x)


class PlainShampoo(torch.optim.Optimizer):
    """One-sided Shampoo in a few lines: batched torch.linalg.eigh of equal sizes, the rest matrix by matrix."""

    def __init__(self, params: list[nn.Parameter], lr: float, betas: tuple[float, float], ridge: float, wd: float):
        super().__init__(params, {"lr": lr})
        self.betas, self.ridge, self.wd = betas, ridge, wd
        # Eigenvalues below the ridge are float32's rounding: roots are off by up to 3e-2 then.
        self.exact = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params, lr = self.param_groups[0]["params"], self.param_groups[0]["lr"]
        sizes: dict[int, list[nn.Parameter]] = {}
        for p in params:
            state, g = self.state[p], p.grad
            if not state:
                state["m"], state["l"] = torch.zeros_like(p), torch.zeros(min(p.shape), min(p.shape))
            state["m"].lerp_(g, 1 - self.betas[0])
            state["l"].lerp_(g @ g.T if p.shape[0] <= p.shape[1] else g.T @ g, 1 - self.betas[1])
            sizes.setdefault(min(p.shape), []).append(p)
        for members in sizes.values():
            factors = torch.stack([self.state[p]["l"] for p in members])
            dtype = torch.float64 if self.exact else factors.dtype
            values, vectors = (t.to(factors.dtype) for t in torch.linalg.eigh(factors.to(dtype)))
            # A factor may still be zero: the first gradient of one half of a low-rank map is.
            damped = (values.clamp_min(0) + self.ridge * values[:, -1:]).clamp_min(1e-30) ** -0.5
            for p, root in zip(members, (vectors * damped[:, None, :]) @ vectors.mT):
                m = self.state[p]["m"]
                u = root @ m if p.shape[0] <= p.shape[1] else m @ root
                p.mul_(1 - lr * self.wd)
                p.add_(u, alpha=-lr * 0.2 * p.numel() ** 0.5 / max(u.norm().item(), 1e-30))


class PlainTrainer:
    """Steps of a config on batches, without logs, checkpoints or checks."""

    def __init__(self, config: TrainConfig, student: Decoder, teacher: Decoder | None) -> None:
        self.config, length = config, config.data.seq_len
        self.model = PlainDecoder(student, length)
        self.teacher = None if teacher is None else PlainDecoder(teacher, length).requires_grad_(False)
        self.optimizers = self._optimizers()
        self.loss = torch.compile(self._loss, fullgraph=True)

    def set_exact(self, exact: bool) -> None:
        """Whether Shampoo's eigendecompositions are in float64, for a comparison; one would write float32."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, PlainShampoo):
                optimizer.exact = exact

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        o = self.config.optimizer
        matrices = [p for p in self.model.parameters() if p.dim() > 1 and p is not self.model.embedding.weight]
        rest = [p for p in self.model.parameters() if not any(p is q for q in matrices)]
        groups: list[dict[str, Any]] = [{"params": rest, "weight_decay": 0.0}]
        found: list[torch.optim.Optimizer] = []
        if o.name == "shampoo":
            found.append(PlainShampoo(matrices, o.lr, (o.beta1, o.shampoo.beta2), o.shampoo.ridge, o.weight_decay))
        else:
            groups.append({"params": matrices, "weight_decay": o.weight_decay})
        return [*found, torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)]

    def _loss(self, tokens: Tensor) -> Tensor:
        inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()
        logits = self.model(inputs).flatten(0, 1) @ self.model.embedding.weight.T
        hard = F.cross_entropy(logits, labels)
        if self.teacher is None:
            return hard
        with torch.no_grad():
            given = self.teacher(inputs).flatten(0, 1) @ self.teacher.embedding.weight.T
        t, omega = self.config.teacher, self.config.schedule.omega
        log_p = F.log_softmax(given / t.temperature, -1)
        log_q = F.log_softmax(logits / t.student_temperature, -1)
        return (1 - omega) * hard + omega * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def step(self, number: int, tokens: Tensor) -> tuple[float, float]:
        """Loss and gradient norm before the update."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self.loss(tokens)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        rate = learning_rate(self.config.optimizer, self.config.schedule.steps, number)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        return loss.item(), norm.item()

    @torch.no_grad()
    def validate(self, batches: list[Tensor]) -> float:
        def one(tokens: Tensor) -> Tensor:
            logits = self.model(tokens[:, :-1]).flatten(0, 1) @ self.model.embedding.weight.T
            return F.cross_entropy(logits, tokens[:, 1:].flatten())

        return torch.stack([one(tokens) for tokens in batches]).mean().item()
