"""Generators of the synthetic tasks of looped models: p-hop induction and addition of n numbers.

Source: Saunshi et al., arXiv 2502.17416. Everything is drawn from the given generator alone.
"""

import torch
from torch import Tensor


def previous(tokens_BT: Tensor) -> Tensor:
    """find_1 of every position, counted from 1: max({0} u {j <= i : v_{j-1} = v_i})."""
    length = tokens_BT.shape[1]
    same_BTT = tokens_BT[:, :, None] == tokens_BT[:, None, :]
    places = torch.arange(1, length + 1)
    # A match at place j - 1 < i stands for j.
    return torch.where(same_BTT & (places[None, :] < places[:, None]), places + 1, 0).amax(2)


def hops(tokens_BT: Tensor, count: int) -> Tensor:
    """find_p of every position, counted from 1; 0 where it leaves the sequence."""
    once_BT = previous(tokens_BT)
    # Place 0 leads to itself.
    table = torch.nn.functional.pad(once_BT, (1, 0))
    at_BT = torch.arange(1, tokens_BT.shape[1] + 1).expand_as(tokens_BT)
    for _ in range(count):
        at_BT = table.gather(1, at_BT)
    return at_BT


def p_hop_answers(tokens_BT: Tensor, count: int) -> Tensor:
    """v[find_p(v, i)] for every position i; -100 where find_p is 0."""
    at_BT = hops(tokens_BT, count)
    return torch.where(at_BT > 0, tokens_BT.gather(1, (at_BT - 1).clamp_min(0)), -100)


def p_hop(batch: int, length: int, count: int, letters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences that hold the p hops from their last position, and the answers there: int64 [B, T] and [B].

    Places T = i_0 > i_1 > ... > i_p >= 2 lie at least 2 apart, letters l_t != l_{t-1}; v[i_t] = l_t and
    v[i_{t+1} - 1] = l_t, whatever else is in [i_{t+1}, i_t) is not l_t, and what lies before is free. Then
    find_1(v, i_t) = i_{t+1}, and the answer is l_p, uniform over the letters.

    Raises:
        ValueError: the hops do not fit, or there are fewer than 2 letters.
    """
    room = length - 2 - count
    if count < 1 or room < count:
        raise ValueError(f"p_hop: {count} hops must be at least 1 and at most (length - 2) / 2, got length {length}")
    if letters < 2:
        raise ValueError(f"p_hop: letters must be at least 2, got {letters}")

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    chosen = torch.rand(batch, room, generator=generator).topk(count).indices.sort(1).values + 1
    place_BP = length - chosen - torch.arange(1, count + 1)
    place_BP = torch.cat([torch.full((batch, 1), length), place_BP], 1)
    steps = torch.cat([draw(letters, batch, 1), 1 + draw(letters - 1, batch, count)], 1)
    letter_BP = steps.cumsum(1) % letters
    # The hop whose stretch [i_{t+1}, i_t) a position is in; `count` before all of them.
    hop_BT = (place_BP[:, 1:, None] > torch.arange(1, length + 1)).sum(1)
    forbidden_BT = letter_BP.gather(1, hop_BT.clamp_max(count - 1))
    other_BT = (forbidden_BT + 1 + draw(letters - 1, batch, length)) % letters
    tokens_BT = torch.where(hop_BT < count, other_BT, draw(letters, batch, length))
    tokens_BT.scatter_(1, place_BP - 1, letter_BP)
    tokens_BT.scatter_(1, place_BP[:, 1:] - 2, letter_BP[:, :-1])
    return tokens_BT, letter_BP[:, -1]


PLUS, EQUALS, END = 10, 11, 12
ADDITION_VOCAB = 13


def addition(batch: int, operands: int, digits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sums as characters, `045 + 824 = 869`, without spaces: tokens [B, T] and labels [B, T], int64.

    Operands are uniform in [0, 10^digits) and padded with zeros; the sum is not padded, ends with END, and what follows
    is END again, so that all rows have one length. labels[i] is the token after i where it belongs to the answer (the
    first END included), else -100.
    """
    values = torch.randint(10**digits, (batch, operands), generator=generator)
    powers = 10 ** torch.arange(digits - 1, -1, -1)
    written = values[:, :, None] // powers % 10
    signs = torch.full((batch, operands, 1), PLUS)
    signs[:, -1] = EQUALS
    prompt = torch.cat([written, signs], 2).reshape(batch, -1)
    width = len(str(operands * (10**digits - 1)))
    total = values.sum(1)
    of_total = total[:, None] // 10 ** torch.arange(width - 1, -1, -1) % 10
    # Leading zeros go behind the number, as END.
    size = (total[:, None] >= 10 ** torch.arange(1, width)).sum(1) + 1 if width > 1 else torch.ones_like(total)
    place = torch.arange(width + 1) + (width - size)[:, None]
    answer = torch.where(place < width, of_total.gather(1, place.clamp_max(width - 1)), END)
    tokens = torch.cat([prompt, answer], 1)
    follows = torch.cat([tokens[:, 1:], torch.full((batch, 1), END)], 1)
    at = torch.arange(tokens.shape[1])
    first = prompt.shape[1] - 1
    counted = (at >= first) & (at <= first + size[:, None])
    return tokens, torch.where(counted, follows, -100)
