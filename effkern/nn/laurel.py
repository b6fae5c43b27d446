"""`LaurelResidual`: one learned residual with its parameters, and the history that joins residuals of a stack.

D channels, r rank, k inputs that a residual mixes (its own and k - 1 previous ones)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effkern.ops.laurel import laurel_residual
from effkern.ops.laurel.scalars import SCALAR_MAPS, coefficients, rows_of


class Variant(NamedTuple):
    """What a variant adds to f(x) + x."""

    scalars: bool
    """alpha and beta."""
    low_rank: bool
    """A and B."""
    previous: bool
    """A sum over previous inputs with factors gamma."""
    shared: bool = False
    """One A and one B for all inputs of the sum, not one pair each."""


VARIANTS = {
    "rw": Variant(True, False, False),
    "lr": Variant(False, True, False),
    "pa-id": Variant(False, False, True),
    "pa-shared": Variant(False, True, True, shared=True),
    "rw+lr": Variant(True, True, False),
    "rw+pa": Variant(True, False, True),
    "rw+pa-shared": Variant(True, True, True, shared=True),
    "rw+lr+pa": Variant(True, True, True),
}

INITS = ("column_orthogonal", "xavier")

History = tuple[Tensor, ...]


class LaurelStep(NamedTuple):
    """See LaurelResidual.forward."""

    y: Tensor
    normed: Tensor | None
    history: History


def column_orthogonal(dim: int, rank: int) -> Tensor:
    """The paper's start of A for language models, [D, r]: 1/sqrt(r D) where i mod r = j, else 0; A^T A = I/r^2.

    (The last is exact where r divides D.)
    """
    down = torch.zeros(dim, rank)
    down[torch.arange(dim), torch.arange(dim) % rank] = (rank * dim) ** -0.5
    return down


class LaurelResidual(nn.Module):
    """y = alpha f(x) + beta (x + what the variant adds); see effkern.laurel_residual for kernel, memory and errors.

    rw         alpha f + beta x
    lr         f + x + x A B
    pa-id      f + x + sum_j gamma_j x_j                    x_0 is x, x_j the input of the j-th residual before it
    pa-shared  f + x + sum_j gamma_j (x_j A) B
    rw+lr      alpha f + beta (x + x A B)
    rw+pa      alpha f + beta (x + sum_j gamma_j x_j)       rw+pa-shared: beta (x + sum_j gamma_j (x_j A) B)
    rw+lr+pa   alpha f + beta (x + sum_j gamma_j (x_j A_j) B_j)

    At the start it is a plain residual, except for scalar_map="softmax" and "sigmoid1" (0.5 f + 0.5 x).
    The low-rank variants over previous inputs look ahead: a residual multiplies its input by the A of every later
    residual that will read it, and hands those r numbers per token on in `history`, not the input. With shared A it
    therefore needs the later ones: `link` them once.

    Args:
        dim: D.
        variant: a key of VARIANTS.
        rank: r, 1 <= r <= D; the paper recommends 32, 48 or 64 for language models.
        num_previous: earlier residuals that this one reads, k - 1 (fewer for the first of a stack).
        num_following: later residuals that read this one's input, k - 1 (fewer for the last).
        scalar_map, per_channel: of alpha and beta; see laurel_residual. per_channel also for gamma_j of whole inputs.
        x0: also add gamma_0' x0, the network's first hidden state; the factor starts at 0.
        init: of A: "column_orthogonal" (the paper's for language models) or "xavier" (its ResNet's). B starts at 0,
            gamma at 1 with A and B, otherwise at 0.
        save_branch, impl: as in laurel_residual.

    The scalars are float32 in every model: `.to(dtype)` and `.half()` leave them.

    Raises:
        ValueError: an argument breaks a rule.
    """

    def __init__(
        self,
        dim: int,
        variant: str = "rw+lr",
        *,
        rank: int = 32,
        num_previous: int = 0,
        num_following: int = 0,
        scalar_map: str = "softmax2",
        per_channel: bool = False,
        x0: bool = False,
        init: str = "column_orthogonal",
        save_branch: bool | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _require("variant", variant, variant in VARIANTS, f"be one of {sorted(VARIANTS)}")
        _require("scalar_map", scalar_map, scalar_map in SCALAR_MAPS, f"be one of {sorted(SCALAR_MAPS)}")
        _require("init", init, init in INITS, f"be one of {sorted(INITS)}")
        kind = VARIANTS[variant]
        if kind.low_rank:
            _require("rank", rank, 1 <= rank <= dim, f"lie in [1, D={dim}]")
        for name, count in (("num_previous", num_previous), ("num_following", num_following)):
            _require(name, count, count >= 0, "be at least 0")
            _require(name, count, kind.previous or count == 0, f"be 0 for variant {variant!r}, which reads none")
        self.dim, self.variant, self.kind, self.rank = dim, variant, kind, rank
        self.num_previous, self.num_following = num_previous, num_following
        self.scalar_map, self.impl, self.init, self.save_branch = scalar_map, impl, init, save_branch
        self.weights = self.gamma = self.x0_weight = self.down = self.up = None

        def scalars(count: int) -> nn.Parameter:
            shape = (count, dim) if per_channel else (count,)
            return nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))

        if kind.scalars:
            self.weights = scalars(SCALAR_MAPS[scalar_map])
        if kind.previous:
            one_each = torch.empty(1 + num_previous, device=device, dtype=torch.float32)
            self.gamma = nn.Parameter(one_each) if kind.low_rank else scalars(1 + num_previous)
        if x0:
            self.x0_weight = scalars(1)
        if kind.low_rank:
            reads, sends = (1, 1) if kind.shared else (1 + num_previous, 1 + num_following)
            self.down = nn.Parameter(torch.empty(dim, sends * rank, device=device, dtype=dtype))
            self.up = nn.Parameter(torch.empty(reads * rank, dim, device=device, dtype=dtype))
        # The linked stack, one list for all of its residuals, in which they are not registered as submodules.
        self._stack: list[LaurelResidual] = []
        self._place = 0
        self.reset_parameters()

    @classmethod
    def count(cls, dim: int, variant: str = "rw+lr", **options: Any) -> int:
        """Parameters of a residual with these arguments, without making it."""
        return sum(p.numel() for p in cls(dim, variant, device="meta", **options).parameters())

    @staticmethod
    def link(residuals: Sequence["LaurelResidual"]) -> None:
        """Tell each residual of a stack, in order, which later ones read its input. Needed where A is shared.

        Raises:
            ValueError: some residual reads more inputs than there are before it, or is read by fewer than it says.
        """
        stack = list(residuals)
        for i, residual in enumerate(stack):
            readers = sum(r.num_previous > j for j, r in enumerate(stack[i + 1 :]))
            reads, sends, rule = (
                residual.num_previous,
                residual.num_following,
                f"be {readers}, as so many read its input",
            )
            _require(f"residuals[{i}].num_previous", reads, reads <= i, f"be at most {i}")
            _require(f"residuals[{i}].num_following", sends, sends == readers, rule)
            most = stack[i - 1].num_previous + 1 if i else 0
            _require(
                f"residuals[{i}].num_previous", reads, reads <= most, f"be at most {most}, one more than before it"
            )
            for name in ("variant", "rank", "dim"):
                first, own = getattr(stack[0], name), getattr(residual, name)
                _require(f"residuals[{i}].{name}", own, own == first, f"be that of the stack, {first!r}")
        for i, residual in enumerate(stack):
            residual._stack, residual._place = stack if residual.kind.shared else [], i

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The start described above. `generator`: for init="xavier", on the CPU."""
        if self.weights is not None:
            self.weights.fill_(1.0 if self.scalar_map == "none" else 0.0)
        if self.gamma is not None:
            self.gamma.fill_(1.0 if self.kind.low_rank else 0.0)
        if self.x0_weight is not None:
            self.x0_weight.zero_()
        if self.up is not None and self.down is not None:
            self.up.zero_()
            for columns in self.down.split(self.rank, 1):
                start = column_orthogonal(self.dim, self.rank)
                if self.init == "xavier":
                    nn.init.xavier_uniform_(start, generator=generator)
                columns.copy_(start)

    fill = reset_parameters

    def _apply(self, fn, recurse: bool = True):
        """The scalars go along to other devices, but stay in float32 with all their digits."""
        # Copies of the gradients, as those are cast in place.
        before = {n: (p.detach(), None if p.grad is None else p.grad.clone()) for n, p in self._scalars()}
        super()._apply(fn, recurse)
        for name, p in self._scalars():
            if p.dtype in (torch.bfloat16, torch.float16):
                value, grad = before[name]
                p.grad = None
                p.data = value.to(p.device)
                p.grad = None if grad is None else grad.to(p.device)
        return self

    def scalars(self) -> list[nn.Parameter]:
        """What is multiplied with whole tensors: to be left out of weight decay."""
        return [p for _, p in self._scalars()]

    def _scalars(self) -> list[tuple[str, nn.Parameter]]:
        named = (("weights", self.weights), ("gamma", self.gamma), ("x0_weight", self.x0_weight))
        return [(name, p) for name, p in named if p is not None]

    def forward(
        self,
        branch: Tensor,
        x: Tensor,
        history: History = (),
        *,
        x0: Tensor | None = None,
        norm_weight: Tensor | None = None,
        norm_eps: float = 1e-6,
    ) -> LaurelStep:
        """The residual of one block.

        Args:
            branch: f(x), shape [..., D]. x: the block's input.
            history: of the residual before, () for the first; nothing is kept in the module.
            x0: the first hidden state, if the module was made for it.
            norm_weight: of the RMSNorm behind it, which then comes fused.

        Returns:
            LaurelStep(y, normed | None, history): history is for the next residual: previous inputs, the latest first
            (pa-id, rw+pa), or what is left of their look-ahead products (the other pa variants).

        Raises:
            ValueError: history is shorter than num_previous or of another batch; x0 is missing or not asked for.
        """
        if len(history) < self.num_previous:
            rule = f"hold {self.num_previous} earlier inputs or their products"
            raise ValueError(f"LaurelResidual: history must {rule}, got {len(history)}")
        if (x0 is None) != (self.x0_weight is None):
            rule = "be given" if x0 is None else "be None, as the module was made with x0=False"
            raise ValueError(f"LaurelResidual: x0 must {rule}, got {'None' if x0 is None else 'a tensor'}")
        for j, h in enumerate(history[: self.num_previous]):
            if h.shape[:-1] != x.shape[:-1]:
                want, got = tuple(x.shape[:-1]), tuple(h.shape[:-1])
                raise ValueError(f"LaurelResidual: history[{j}] must be of this batch, {want}, got {got}")
        addends: list[Tensor] = []
        factors: list[Tensor] = []
        weights, gamma, x0_weight = _full(self.weights), _full(self.gamma), _full(self.x0_weight)
        if x0 is not None and x0_weight is not None:
            addends.append(x0)
            factors.append(rows_of(x0_weight))
        down: Tensor | None = self.down
        up: Tensor | None = self.up
        past = None
        if self.kind.previous and self.kind.low_rank:
            assert gamma is not None
            assert up is not None
            down = self._sent_down()
            past = self._past(history)
            if self.kind.shared:
                # [gamma_0 B; gamma_1 B; ...]
                up = (gamma.to(up.dtype)[:, None, None] * up).flatten(0, 1)
            else:
                up = up * gamma.to(up.dtype).repeat_interleave(self.rank)[:, None]
        elif self.kind.previous:
            assert gamma is not None
            factor = rows_of(gamma)
            if weights is not None:
                factor = factor * coefficients(weights, self.scalar_map)[1]
            addends += [x, *history[: self.num_previous]]
            factors.append(factor)
        out = laurel_residual(
            branch, x, weights=weights, scalar_map=self.scalar_map, down=down, up=up, past=past, addends=addends,
            addend_weights=_stack(factors), norm_weight=norm_weight, norm_eps=norm_eps, save_branch=self.save_branch,
            impl=self.impl,
        )  # fmt: skip
        return LaurelStep(out.y, out.normed, self._next_history(x, out.ahead, history))

    def _sent_down(self) -> Tensor:
        """All matrices that read this input: its own, then those of later residuals."""
        assert self.down is not None
        if not self.kind.shared:
            return self.down
        following: list[Tensor] = []
        if self.num_following:
            if not self._stack:
                rule = f"tell of {self.num_following} later residuals"
                raise ValueError(f"LaurelResidual: link(residuals) must {rule}, got none")
            later = self._stack[self._place + 1 : self._place + 1 + self.num_following]
            following = [r.down for r in later if r.down is not None]
            if any(type(d) is not type(self.down) for d in following):
                rule = "be gathered with it: keep a stack with shared A in one unit of FSDP"
                raise RuntimeError(f"LaurelResidual: A of later residuals must {rule}, got it sharded")
        return torch.cat([self.down, *following], 1)

    def _past(self, history: History) -> Tensor | None:
        if self.num_previous == 0:
            return None
        return torch.cat([h[..., : self.rank] for h in history[: self.num_previous]], -1)

    def _next_history(self, x: Tensor, ahead: Tensor | None, history: History) -> History:
        if not self.kind.previous:
            return ()
        if not self.kind.low_rank:
            # The next residual reads at most one more than this one.
            return (x, *history)[: self.num_previous + 1] if self.num_following else ()
        rest = [h[..., self.rank :] for h in history]
        mine = () if ahead is None else (ahead,)
        return (*mine, *(h for h in rest if h.shape[-1]))

    def extra_repr(self) -> str:
        rank = f", rank={self.rank}" if self.kind.low_rank else ""
        return f"{self.dim}, {self.variant!r}{rank}, previous={self.num_previous}, {self.scalar_map!r}"


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"LaurelResidual: {name} must {rule}, got {value!r}")


def _full(p: Tensor | None) -> Tensor | None:
    """Scalars in float32: FSDP casts gathered parameters as it likes."""
    return p.float() if p is not None and p.dtype in (torch.bfloat16, torch.float16) else p


def _stack(factors: list[Tensor]) -> Tensor | None:
    """[M, 1] and [M, D] rows, one below the other; [M] where none is per channel."""
    if not factors:
        return None
    width = max(f.shape[1] for f in factors)
    if width == 1:
        return torch.cat(factors).squeeze(1)
    return torch.cat([f.expand(-1, width) for f in factors])
