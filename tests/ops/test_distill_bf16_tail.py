"""bfloat16 gradients of vocabularies that are no multiple of 32: what lies behind a row must not reach a product.

The gradient fills the first half of a row of float32 logits. On a CPU with AMX, matrix products read past its end, and
the bits there are NaN in one of 130 entries.
"""

import pytest
import torch

import effkern
from tests.numerics import assert_as_good_as_eager


@pytest.mark.parametrize("vocab", [3, 31, 33, 61, 97, 1003])
@pytest.mark.parametrize("ignored", [False, True])
def test_every_gradient(vocab, ignored):
    hidden, weight = torch.randn(512, 32).bfloat16(), torch.randn(vocab, 32).bfloat16()
    labels = torch.randint(0, vocab, (512,))
    if ignored:
        labels[::5] = -100

    def gradients(dtype, **options):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        effkern.linear_distill_loss(h, w, labels, **options).loss.backward()
        return h.grad, w.grad

    truth = gradients(torch.float64, impl="reference")
    eager = gradients(torch.bfloat16, impl="reference")
    for fast, plain, true in zip(gradients(torch.bfloat16), eager, truth):
        assert_as_good_as_eager(fast, plain, true)
