"""Shampoo's operations on a decoder's matrices beside their floor, torch.linalg.eigh and torch's Muon.

    python -m benchmarks.ops.shampoo                    6 layers of width 384, 2 threads
    python -m benchmarks.ops.shampoo --json             one JSON object per line

Parameters: 4 x 384x384, 384x1536 and 1536x384 per layer, one-sided on the side of 384, so that 36 roots are one batch.
Floor: the Gram products at half the time of torch.bmm (one triangle is half the work), LAPACK's float32 eigh with a
half product, one whole matrix per thread, and the bare torch.bmm of root and gradient. "step" is Gram matrices, roots
and updates with momentum and norm; "step, roots / 10" has a tenth of the roots' time. FLOPs of a root are those of an
eigendecomposition without its iteration, 4/3 + 2 n^3, and half of a product.
"""

from collections.abc import Sequence

# First, as it sets the thread policy before torch is imported.
from benchmarks import harness  # isort: skip

import torch
from torch import Tensor

from benchmarks.case import Axis, Case, Huge, Op, Prepared, Run, Scaling, Terms, Work, WrongResult, hold
from effkern.ops.shampoo import apply_, gram_ema_, inverse_root, methods

# Moving averages before a measurement.
STEPS = 12
DECAY = 0.95
GROUPS = (("left", 4, 1, 1), ("left", 1, 1, 4), ("right", 1, 4, 1))
# LAPACK in float32 is asked for down to here.
SINGLE_RIDGE = 1e-5


class Decoder:
    """Gradients, momenta and weights by shape; factors and roots in one batch."""

    def __init__(self, layers: int, width: int, steps: int) -> None:
        torch.manual_seed(0)
        self.groups = [(side, layers * n, width * m, width * k) for side, n, m, k in GROUPS]
        count = sum(n for _, n, _, _ in self.groups)
        self.factors = torch.zeros(count, width, width)
        self.roots = torch.zeros_like(self.factors)
        self.scales = torch.logspace(0, -2.6, width)
        self.rotations = torch.linalg.qr(torch.randn(count, width, width)).Q
        self.grads: list[Tensor] = []
        for _ in range(steps):
            self.grads = self._gradients()
            self.grams()
        self.weights = [torch.randn_like(g) for g in self.grads]
        self.momenta = [torch.zeros_like(g) for g in self.grads]
        self.products = [torch.empty_like(g) for g in self.grads]
        self.squares = [torch.empty(n, width, width) for _, n, _, _ in self.groups]
        self.scratch = self.factors.clone()

    def parts(self, batch: Tensor) -> list[Tensor]:
        return list(batch.split([n for _, n, _, _ in self.groups]))

    def _gradients(self) -> list[Tensor]:
        """Of the spectrum of a moving average of low rank plus noise, in a basis of each matrix's own."""
        found = []
        for (side, n, m, k), Q in zip(self.groups, self.parts(self.rotations)):
            other = k if side == "left" else m
            G = Q @ (self.scales[:, None] * torch.randn(n, Q.shape[1], other))
            found.append(G if side == "left" else G.mT.contiguous())
        return found

    def grams(self, factors: Tensor | None = None) -> None:
        """Folds the gradients into the factors, or into a batch of other ones."""
        given = self.factors if factors is None else factors
        for (side, *_), factor, grads in zip(self.groups, self.parts(given), self.grads):
            gram_ema_(factor, grads, side=side, decay=DECAY, weight=1 - DECAY)

    def root(self, method: str, ridge: float) -> None:
        inverse_root(self.factors, method=method, ridge=ridge, out=self.roots)

    def updates(self) -> None:
        for i, ((side, *_), roots) in enumerate(zip(self.groups, self.parts(self.roots))):
            left, right = (roots, None) if side == "left" else (None, roots)
            apply_(
                self.weights[i], self.grads[i], left, right, lr=1e-3, momenta=self.momenta[i], momentum_decay=0.9,
                momentum_weight=0.1, weight_decay=0.1, norm=1.0,
            )  # fmt: skip

    def bare_grams(self) -> None:
        for (side, *_), grads, out in zip(self.groups, self.grads, self.squares):
            G = grads if side == "left" else grads.mT
            torch.bmm(G, G.mT, out=out)

    def bare_updates(self) -> None:
        for (side, *_), roots, grads, out in zip(self.groups, self.parts(self.roots), self.grads, self.products):
            torch.bmm(*((roots, grads) if side == "left" else (grads, roots)), out=out)

    def torch_roots(self) -> None:
        lam, Q = torch.linalg.eigh(self.factors)
        f = (lam.clamp_min(0.0) + SINGLE_RIDGE * lam[:, -1:]) ** -0.5
        torch.bmm(Q * f[:, None], Q.mT, out=self.roots)


def muon(decoder: Decoder) -> Run:
    """torch.optim.Muon on the same matrices, one parameter each."""
    parameters = [torch.nn.Parameter(w.clone()) for group in decoder.weights for w in group]
    for p, g in zip(parameters, (g for group in decoder.grads for g in group)):
        p.grad = g
    return torch.optim.Muon(parameters, lr=1e-3).step


def make(case: Case) -> Decoder:
    return Decoder(case["layers"], case["width"], steps=STEPS)


def check(case: Case) -> None:
    """Of one layer, against float64: roots, a factor's next average, and the update that they give."""
    decoder, ridge = make({**case, "layers": 1}), case["ridge"]
    decoder.root("rational", ridge)
    A = decoder.factors.double()
    lam, Q = torch.linalg.eigh(A)
    hold([(decoder.roots, (Q * ((lam + ridge * lam[:, -1:]) ** -0.5)[:, None]) @ Q.mT)], 1e-2)
    before = [w.double() for w in decoder.weights]
    decoder.grams()
    decoder.updates()
    for (side, *_), factor, was, roots, grad, weight, new in zip(
        decoder.groups, decoder.parts(decoder.factors), decoder.parts(A), decoder.parts(decoder.roots.double()),
        decoder.grads, before, decoder.weights,
    ):  # fmt: skip
        G = grad.double()
        hold([(factor, DECAY * was + (1 - DECAY) * (G @ G.mT if side == "left" else G.mT @ G))], 1e-5)
        update = 0.1 * (roots @ G if side == "left" else G @ roots)
        # Momenta were 0, updates have norm 1.
        step = 1e-3 * update / update.norm(dim=(1, 2), keepdim=True)
        hold([(new.double() - weight, -step - 1e-3 * 0.1 * weight)], 1e-3)


def prepare(case: Case, names: Sequence[str]) -> Prepared:
    decoder, ridge = make(case), case["ridge"]
    made: dict[str, Run] = {
        "bmm G G^T": decoder.bare_grams,
        "bmm X G": decoder.bare_updates,
        "eigh, a matrix per thread": lambda: decoder.root("eigh", SINGLE_RIDGE),
        # Not into the factors: roots would be taken of ever other ones, towards this one gradient's.
        "effkern gram": lambda: decoder.grams(decoder.scratch),
        "effkern root": lambda: decoder.root("rational", ridge),
        "effkern apply": decoder.updates,
        "torch.linalg.eigh and products": decoder.torch_roots,
    }
    if "torch.optim.Muon" in names:
        made["torch.optim.Muon"] = muon(decoder)
    decoder.root("rational", ridge)
    found = {name: made[name] for name in names}
    sums = {k: terms for k, terms in {**FLOORS, **SUMS}.items() if terms.keys() <= found.keys()}
    return Prepared(found, sums=sums)


FLOORS: dict[str, Terms] = {
    "floor: gram": {"bmm G G^T": 0.5},
    "floor: step": {"bmm G G^T": 0.5, "eigh, a matrix per thread": 1.0, "bmm X G": 1.0},
    "floor: step, roots / 10": {"bmm G G^T": 0.5, "eigh, a matrix per thread": 0.1, "bmm X G": 1.0},
}
SUMS: dict[str, Terms] = {
    "effkern step": {"effkern gram": 1.0, "effkern root": 1.0, "effkern apply": 1.0},
    "effkern step with eigh": {"effkern gram": 1.0, "eigh, a matrix per thread": 1.0, "effkern apply": 1.0},
    "effkern step, roots / 10": {"effkern gram": 1.0, "effkern root": 0.1, "effkern apply": 1.0},
    "torch one-sided step": {"bmm G G^T": 1.0, "torch.linalg.eigh and products": 1.0, "bmm X G": 1.0},
}


def floor(variant: str) -> Terms:
    if "gram" in variant or "G G^T" in variant:
        return FLOORS["floor: gram"]
    if "eigh, a" in variant or variant in ("effkern root", "torch.linalg.eigh and products"):
        return {"eigh, a matrix per thread": 1.0}
    if variant in ("effkern apply", "bmm X G"):
        return {"bmm X G": 1.0}
    return FLOORS["floor: step, roots / 10" if variant.endswith("/ 10") else "floor: step"]


def works(case: Case) -> dict[str, Work | None]:
    d, sizes = case["width"], [(case["layers"] * n, m * k) for _, n, m, k in GROUPS]
    count, elements = sum(n for n, _ in sizes), sum(n * ratio for n, ratio in sizes) * d * d
    square = count * d * d
    gram = Work(4 * (elements + 2 * square), elements * d)
    # A bmm writes its result anew: no averages, momenta or weights.
    bare_gram = Work(4 * (elements + square), 2.0 * elements * d)
    bare_apply = Work(4 * (square + 2 * elements), 2.0 * elements * d)
    root = Work(4 * 2 * square, (10 / 3 + 1) * square * d)
    # Root, gradient; momentum and weight, both read and written.
    apply = Work(4 * (square + 5 * elements), 2.0 * elements * d)

    def step(share: float) -> Work:
        parts = ((1.0, gram), (share, root), (1.0, apply))
        return Work(sum(s * p.bytes for s, p in parts), sum(s * p.flops for s, p in parts))

    return {
        "bmm G G^T": bare_gram, "bmm X G": bare_apply, "eigh, a matrix per thread": root,
        "effkern gram": gram, "effkern root": root, "effkern apply": apply, "torch.linalg.eigh and products": root,
        "effkern step, roots / 10": step(0.1), "torch.optim.Muon": None, "": step(1.0),
        **dict.fromkeys(FLOORS),
    }  # fmt: skip


def work(case: Case) -> Work:
    found = works(case)[""]
    assert found is not None
    return found


def why(case: Case) -> list[str]:
    ridge = case["ridge"]
    chosen = methods.resolve("auto", -0.5, ridge, None, "cpp")
    passed = [f"{m}: needs {rule}" for m in methods.POWERS["cpp"] if (rule := methods.covers(m, -0.5, ridge, None))]
    return [f'method="auto" is {chosen} at a ridge of {ridge:g}{"; not " + "; ".join(passed) if passed else ""}']


def huge() -> Huge:
    """A batch of Gram averages with more than 2^31 numbers: the last must be what it is alone."""
    n = 64
    count = (1 << 31) // n**2 + 16

    def run() -> None:
        grads = torch.randn(16, n, 8)
        wide, alone = torch.zeros(count, n, n), torch.zeros(16, n, n)
        gram_ema_(wide, grads.repeat(count // 16, 1, 1), decay=0.5, weight=0.5)
        gram_ema_(alone, grads, decay=0.5, weight=0.5)
        if not torch.equal(wide[-16:], alone):
            raise WrongResult("wrong result of the last matrices")

    return Huge(4 * count * n * (n + 8), f"Gram averages of {count} x {n} x {n}", run)


OP = Op(
    name="shampoo",
    doc=__doc__,
    axes=(
        Axis("layers", "--layers", (6,)),
        Axis("width", "--width", (384,)),
        Axis("ridge", "--ridge", (1e-6,)),
    ),
    variants=(
        "bmm G G^T", "bmm X G", "eigh, a matrix per thread", "effkern gram", "effkern root", "effkern apply",
        "torch.linalg.eigh and products", "torch.optim.Muon",
    ),
    check=check,
    prepare=prepare,
    work=work,
    works=works,
    floor=floor,
    ours="effkern step",
    needs=("bmm G G^T", "bmm X G", "eigh, a matrix per thread"),
    registry=("shampoo_gram_ema_", "shampoo_inverse_root", "shampoo_apply_"),
    why=why,
    devices=("cpu",),
    rounds=21,
    scaling=(
        Scaling("width", (24, 48, 96, 192, 384), {"layers": 1, "ridge": 1e-6}, "3: products and roots of order n"),
        Scaling("layers", (1, 2, 4, 8, 16), {"width": 96, "ridge": 1e-6}, "1: every matrix costs the same"),
    ),
    huge=huge,
)  # fmt: skip

if __name__ == "__main__":
    harness.main(OP)
