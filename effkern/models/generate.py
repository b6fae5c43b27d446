"""Sampling from a decoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effkern.models.adaptive import adaptive_pass
from effkern.models.decoder import Decoder
from effkern.models.exits import ExitTest, exit_test
from effkern.models.kv_policy import KVPolicy


def _filter_logits(logits_BV: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """-inf outside the top_k largest, then outside the smallest set of most likely tokens with mass >= top_p."""
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, ids = logits_BV.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p
        logits_BV = logits_BV.masked_fill(beyond.scatter(-1, ids, beyond), -torch.inf)
    return logits_BV


def _draw(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row by inverse CDF. The uniforms are drawn on the CPU: a seed means the same on every device."""
    cdf = logits_BV.double().softmax(-1).cumsum(-1)
    uniform = torch.rand(len(cdf), 1, generator=generator, dtype=torch.float64).to(cdf.device)
    # Scaling by the last entry keeps the draw inside the support when the sum rounds below one.
    return torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).clamp_max(logits_BV.shape[-1] - 1)


class Generation(NamedTuple):
    """See generate_with_loops."""

    tokens: Tensor
    """int64 [B, T + new]."""
    loops: Tensor
    """Loops of the pass that each new token came from, int64 [B, new, looped stages]."""


def generate(
    model: Decoder,
    tokens_BT: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | None = None,
    use_cache: bool = True,
    loops: int | Sequence[int] | None = None,
    kv_policy: str | KVPolicy | None = None,
    exit: str | ExitTest | None = None,
    compact: bool = True,
) -> Tensor:
    """Continue every row of `tokens_BT`.

    Args:
        model: decoder; runs in evaluation mode, and has its own mode back afterwards.
        tokens_BT: prompts of equal length, int64 [B, T], T >= 1; B = 0 returns nothing of the full length.
        max_new_tokens: at most this many are added; fewer when every row has ended.
        temperature: 0 takes the most likely token; otherwise logits / temperature are sampled.
        top_k: keep the k most likely tokens. top_p: then keep the most likely tokens up to this mass.
        seed: of the draws; the same seed gives the same tokens.
        eos: a token of the vocabulary; a row that has produced it is filled with it.
        use_cache: False recomputes every position (the same tokens with kv_policy "full", slower).
        loops: of looped stages, one number or one for each; the config's by default.
        kv_policy: what looped stages keep of earlier tokens (effkern.models.kv_policy); by default "full", with `exit`
            "latest-available".
        exit: when a row has looped enough for a token (effkern.models.exits): a test, its name, or "kl=1e-4".
        compact: see adaptive_pass.

    Returns:
        int64 [B, T + new].

    Raises:
        ValueError: an argument is out of range, prompt + max_new_tokens exceeds max_seq_len, or the last five do not
            fit the model or each other.
        TypeError: an argument is of another type.
    """
    return generate_with_loops(
        model, tokens_BT, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, eos=eos,
        use_cache=use_cache, loops=loops, kv_policy=kv_policy, exit=exit, compact=compact,
    ).tokens  # fmt: skip


@torch.no_grad()
def generate_with_loops(
    model: Decoder,
    tokens_BT: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | None = None,
    use_cache: bool = True,
    loops: int | Sequence[int] | None = None,
    kv_policy: str | KVPolicy | None = None,
    exit: str | ExitTest | None = None,
    compact: bool = True,
) -> Generation:
    """`generate`, and how many loops each token took. Arguments and errors are those of generate."""
    given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "eos": eos}
    total = _check(model, tokens_BT, max_new_tokens, given)
    test = None if exit is None else exit_test(exit)
    policy = KVPolicy.parse("full" if test is None else "latest-available")
    if kv_policy is not None:
        if not isinstance(kv_policy, (str, KVPolicy)):
            raise TypeError(f"generate: kv_policy must be a name or a KVPolicy, got {kv_policy!r}")
        policy = KVPolicy.parse(kv_policy)
    if not use_cache and (test is not None or kv_policy is not None):
        raise ValueError(f"generate: use_cache must be True for exit and kv_policy, got {use_cache!r}")
    looped = [now.loops for now, own in zip(model.stages(loops), model.stages()) if own.looped]
    loops = looped or None
    if not len(tokens_BT):
        return Generation(
            tokens_BT.new_zeros(0, total),
            torch.zeros(0, max_new_tokens, len(looped), dtype=torch.int64, device=tokens_BT.device),
        )
    cache = None
    if use_cache:
        cache = model.new_cache(len(tokens_BT), total, policy, loops=loops)

    generator = torch.Generator().manual_seed(seed)
    ended = torch.zeros(len(tokens_BT), 1, dtype=torch.bool, device=tokens_BT.device)
    all_loops = torch.tensor([looped] * len(tokens_BT), dtype=torch.int64, device=tokens_BT.device)
    all_loops = all_loops.view(len(tokens_BT), len(looped))
    fresh, counts = tokens_BT, []
    for _ in range(max_new_tokens):
        ran = all_loops
        with _evaluating(model):
            if test is not None:
                assert cache is not None
                hidden, ran = adaptive_pass(model, fresh, cache, test, compact=compact)
            else:
                hidden = model(tokens_BT if cache is None else fresh, cache, loops=loops)
        counts.append(ran)
        logits_BV = model.logits(hidden[:, -1])
        if temperature == 0:
            fresh = logits_BV.argmax(-1, keepdim=True)
        else:
            fresh = _draw(_filter_logits(logits_BV / temperature, top_k, top_p), generator)
        if eos is not None:
            fresh = torch.where(ended, torch.full_like(fresh, eos), fresh)
            ended = ended | (fresh == eos)
        tokens_BT = torch.cat((tokens_BT, fresh), dim=1)
        if eos is not None and bool(ended.all()):
            break
    return Generation(tokens_BT, torch.stack(counts, 1) if counts else all_loops[:, None][:, :0])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without what training alone draws: numbers of loops, first states, dropout. Restores the mode of each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check(model: Decoder, tokens_BT: Tensor, max_new_tokens: int, given: dict[str, Any]) -> int:
    """Length of prompt and new tokens. Raises ValueError and TypeError."""
    _require_type("max_new_tokens", max_new_tokens, (int,), "a whole number")
    for name, value in given.items():
        if value is None and name not in ("temperature", "seed"):
            continue
        if name in ("temperature", "top_p"):
            _require_type(name, value, (int, float), "a number")
        else:
            _require_type(name, value, (int,), "a whole number")
    if tokens_BT.dim() != 2 or tokens_BT.shape[1] < 1:
        raise ValueError(f"generate: tokens_BT must have shape [B, T] with T >= 1, got {tuple(tokens_BT.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
    total, limit = tokens_BT.shape[1] + max_new_tokens, model.config.max_seq_len
    if total > limit:
        raise ValueError(f"generate: prompt + max_new_tokens must be at most max_seq_len={limit}, got {total}")
    temperature, top_k, top_p, eos = (given[name] for name in ("temperature", "top_k", "top_p", "eos"))
    if not temperature >= 0:
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    if eos is not None and not 0 <= eos < model.config.vocab_size:
        raise ValueError(f"generate: eos must be a token below vocab_size={model.config.vocab_size}, got {eos}")
    return total


def _require_type(name: str, value: object, types: tuple[type, ...], rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, types):
        raise TypeError(f"generate: {name} must be {rule}, got {value!r}")
