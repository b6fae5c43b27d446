"""The losses and layers of docs/migration: what a user has, by its formula or the package itself, is what we compute.

Formulas are written from the packages' definitions; single losses are in tests/ops/test_distill_equivalence.py, here is
what surrounds them: shifts, masks, denominators, mixtures, options. Packages are called where they are installed and
run on a CPU.
"""

import ast
import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import effkern
from effkern import TeacherHidden, TeacherLogits, linear_distill_loss
from effkern.integrations.trl import gkd_loss
from effkern.optim import LoRARite, Shampoo
from tests.numerics import rel_err

IGNORED = -100
PAGES = Path(__file__).parents[1] / "docs" / "migration"


class Case:
    """Hidden states and output layers of student and teacher, [batch, length, ..], in one dtype; unshifted labels."""

    def __init__(self, dtype: torch.dtype = torch.float64, batch: int = 3, length: int = 9, vocab: int = 40) -> None:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)

        self.hidden, self.head = normal(batch, length, 8).requires_grad_(), normal(vocab, 8).requires_grad_()
        self.states, self.teacher_head = normal(batch, length, 5), normal(vocab, 5)
        self.bias, self.teacher_bias = normal(vocab).requires_grad_(), normal(vocab)
        self.labels = torch.randint(0, vocab, (batch, length))
        self.labels[0, :4] = self.labels[1, 6:] = IGNORED

    @property
    def z(self) -> Tensor:
        return self.hidden @ self.head.t()

    @property
    def u(self) -> Tensor:
        return self.states @ self.teacher_head.t()

    def shifted(self) -> Tensor:
        """[batch x length]: what position t predicts, nothing at the last one."""
        return F.pad(self.labels[:, 1:], (0, 1), value=IGNORED).flatten()

    def ours(self, labels: Tensor, *, teacher: TeacherHidden | None = None, **options):
        options = {"omega": 1.0, "temperature": 1.0, "teacher_temperature": 1.0} | options
        teacher = teacher or TeacherHidden(self.states.flatten(0, 1), self.teacher_head)
        return linear_distill_loss(self.hidden.flatten(0, 1), self.head, labels, teacher=teacher, **options)

    def gradients(self, loss: Tensor, *more: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.head, *more), retain_graph=True)]


def same(found: list[Tensor], truth: list[Tensor], bound: float = 1e-12) -> None:
    for a, b in zip(found, truth, strict=True):
        assert rel_err(a, b.double()) < bound


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Agarwal et al., equation 1, q the student's; with the ends that TRL and Liger-Kernel give it."""
    if beta in (0, 1):
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


# TRL


def gkd_step(x: Case, prompt: int, beta: float, loss) -> Tensor:
    """GKDTrainer's loss: logits from the prompt's last position on, labels behind the prompt, no temperature given."""
    return loss(x.z[:, prompt - 1 : -1], x.u[:, prompt - 1 : -1], labels=x.labels[:, prompt:], beta=beta)


def generalized_jsd(z: Tensor, u: Tensor, labels: Tensor, beta: float) -> Tensor:
    return jsd(z.log_softmax(-1), u.log_softmax(-1), beta)[labels != IGNORED].mean()


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
def test_trl_step_from_logits_and_from_hidden_states(beta):
    x, prompt = Case(), 3
    truth = x.gradients(gkd_step(x, prompt, beta, generalized_jsd))
    same(x.gradients(gkd_step(x, prompt, beta, gkd_loss)), truth)
    # The prompt is left out by its labels instead of by a slice.
    labels = x.labels.clone()
    labels[:, :prompt] = IGNORED
    x.labels = labels
    kind = {0: {"divergence": "forward_kl"}, 1: {"divergence": "reverse_kl"}}.get(beta)
    same(x.gradients(x.ours(x.shifted(), **(kind or {"divergence": "jsd", "beta": beta})).loss), truth)


def test_trl_later_divides_by_the_tokens_of_all_steps():
    """num_items_in_batch, and every labelled position instead of those behind the longest prompt."""
    x, items = Case(), 50
    labels = x.labels[:, 1:]
    total = jsd(x.z[:, :-1].log_softmax(-1), x.u[:, :-1].log_softmax(-1), 0.3)[labels != IGNORED].sum()
    truth = x.gradients(total / items)
    same(x.gradients(gkd_loss(x.z[:, :-1], x.u[:, :-1], labels, beta=0.3, num_items_in_batch=items)), truth)
    same(x.gradients(x.ours(x.shifted(), divergence="jsd", beta=0.3, denom=items).loss), truth)


def test_trl_fused_path_mixes_cross_entropy_and_takes_the_temperature():
    """What use_liger_kernel=True trained on at 054a0da: half cross entropy, half JSD at the config's temperature."""
    x, t = Case(), 0.9
    log_q, log_p, labels = (x.z / t).log_softmax(-1), (x.u / t).log_softmax(-1), x.shifted()
    soft = jsd(log_q, log_p, 0.5).flatten()[labels != IGNORED].mean()
    hard = F.cross_entropy(x.z.flatten(0, 1), labels)
    ours = x.ours(labels, omega=0.5, divergence="jsd", beta=0.5, temperature=t, teacher_temperature=t)
    same(x.gradients(ours.loss), x.gradients(0.5 * hard + 0.5 * soft))


# Liger-Kernel

LIGER_CASES = [
    {"beta": 0.3, "temperature": 2.0},
    {"beta": 0.0, "weight_hard_loss": 0.0, "weight_soft_loss": 1.0},
    {"beta": 1.0, "weight_hard_loss": 0.25, "weight_soft_loss": 0.75},
    {"beta": 0.5, "weight_hard_loss": 0.2, "weight_soft_loss": 0.6, "temperature": 0.7},
]


def by_liger(x: Case, name: str, labels: Tensor, *, bias: bool = False, **options) -> Tensor:
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    student, teacher = (x.hidden.flatten(0, 1), x.head), (x.states.flatten(0, 1), x.teacher_head)
    biases = (x.bias, x.teacher_bias) if bias else ()
    return getattr(chunked, name)(compiled=False, **options)(*student, *teacher, labels, *biases)


def as_ours(beta: float, weight_hard_loss=0.5, weight_soft_loss=0.5, temperature=1.0) -> tuple[dict, float]:
    """The page's rule: options, and the factor that both weights have in common."""
    factor = weight_hard_loss + weight_soft_loss
    kind = {0.0: {"divergence": "forward_kl"}, 1.0: {"divergence": "reverse_kl"}}.get(beta)
    kind = kind or {"divergence": "jsd", "beta": beta}
    both = {"temperature": temperature, "teacher_temperature": temperature}
    return {"omega": weight_soft_loss / factor, **kind, **both}, factor


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", LIGER_CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_liger_jsd_itself(options, bias):
    x = Case()
    labels, more = x.shifted(), (x.bias,) if bias else ()
    truth = x.gradients(by_liger(x, "LigerFusedLinearJSDLoss", labels, bias=bias, **options), *more)
    mapped, factor = as_ours(**options)
    if bias:
        mapped["bias"] = x.bias
        mapped["teacher"] = TeacherHidden(x.states.flatten(0, 1), x.teacher_head, x.teacher_bias)
    found = x.gradients(factor * x.ours(labels, **mapped).loss, *more)
    # Its cross entropy and its sum over chunks are float32 for float64 inputs as well.
    same(found, truth, 1e-6)


def test_liger_cosine_itself():
    x = Case()
    labels = x.shifted()
    truth = x.gradients(by_liger(x, "LigerFusedLinearCosineSimilarityLoss", labels, beta=1.0, temperature=3.0))
    same(x.gradients(x.ours(labels, omega=0.5, divergence="cosine").loss), truth, 1e-6)


def test_liger_pads_a_smaller_student_and_we_cut_the_teacher():
    """With more entries in the teacher's layer its padding gets a probability; cut on both sides it is our loss."""
    x = Case()
    whole, labels, valid = x.teacher_head, x.shifted(), x.head.shape[0]
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.5}
    x.teacher_head = torch.cat([whole, torch.zeros(20, 5, dtype=torch.float64)])
    ours = x.ours(labels, divergence="jsd", beta=0.5, vocab_valid=valid).loss
    padded = by_liger(x, "LigerFusedLinearJSDLoss", labels, **options)
    x.teacher_head = whole
    cut = by_liger(x, "LigerFusedLinearJSDLoss", labels, **options)
    assert rel_err(ours.detach(), cut.detach().double()) < 1e-6
    assert rel_err(padded.detach(), cut.detach().double()) > 0.02


def test_liger_in_bfloat16_rounds_logits_and_we_do_not():
    """A student near its teacher: gradients of the hidden states against float64 of the same bfloat16 inputs."""
    x = Case(torch.bfloat16, batch=4, length=64, vocab=500)
    with torch.no_grad():
        x.hidden.normal_()
        x.states, x.teacher_head = (x.hidden + 0.05 * torch.randn_like(x.hidden)).detach(), x.head.detach().clone()
    labels = x.shifted()
    exact = Case()
    exact.hidden, exact.head = (t.detach().double().requires_grad_() for t in (x.hidden, x.head))
    exact.states, exact.teacher_head = x.states.double(), x.teacher_head.double()
    truth = exact.gradients(exact.ours(labels, divergence="jsd", beta=0.5).loss)
    ours = x.gradients(x.ours(labels, divergence="jsd", beta=0.5).loss)
    theirs = x.gradients(
        by_liger(x, "LigerFusedLinearJSDLoss", labels, beta=0.5, weight_hard_loss=0.0, weight_soft_loss=1.0)
    )
    for mine, other, t in zip(ours[1:], theirs[1:], truth[1:], strict=True):
        assert rel_err(mine, t) < 0.2 * rel_err(other, t)


def test_liger_cross_entropy_options():
    """LigerFusedLinearCrossEntropyLoss (Triton: GPU only) by its definition: smoothing, z loss, softcap, reductions."""
    x = Case()
    labels, eps, c, cap = x.shifted(), 0.1, 1e-2, 5.0
    kept = labels != IGNORED
    z = cap * torch.tanh(x.z.flatten(0, 1) / cap)
    each = F.cross_entropy(z, labels, label_smoothing=eps, reduction="none") + c * z.logsumexp(-1).square()
    hidden = x.hidden.flatten(0, 1)
    for reduction, truth in (("mean", each[kept].mean()), ("sum", each[kept].sum())):
        result = linear_distill_loss(
            hidden, x.head, labels, label_smoothing=eps, z_loss=c, softcap=cap, reduction=reduction
        )
        same(x.gradients(result.loss), x.gradients(truth))
    # return_z_loss, return_token_accuracy, return_predicted_tokens
    stats = result.stats
    torch.testing.assert_close((c * stats.lse.square())[kept], c * z.logsumexp(-1).square()[kept].detach())
    torch.testing.assert_close(stats.hit[kept], (z.argmax(-1) == labels)[kept].double())


def test_liger_class_weights_and_token_scaling():
    x = Case()
    labels, hidden = x.shifted(), x.hidden.flatten(0, 1)
    of_class = torch.rand(x.head.shape[0], dtype=torch.float64) + 0.5
    truth = F.cross_entropy(x.z.flatten(0, 1), labels, weight=of_class)
    ours = linear_distill_loss(hidden, x.head, labels, weights=of_class[labels.clamp_min(0)]).loss
    same(x.gradients(ours), x.gradients(truth))
    # use_token_scaling: each token's loss times its own probability, which gets no gradient; the mean over all tokens.
    each, kept = F.cross_entropy(x.z.flatten(0, 1), labels, reduction="none"), labels != IGNORED
    scaled = ((-each).exp().detach() * each)[kept].mean()
    scores = effkern.token_stats(hidden, x.head, labels)
    ours = linear_distill_loss(hidden, x.head, labels, weights=(-scores.loss).exp(), denom=kept.sum()).loss
    same(x.gradients(ours), x.gradients(scaled))


# torchtune


def forward_kl_loss(z: Tensor, u: Tensor, labels: Tensor) -> Tensor:
    """-sum p log q: without the teacher's entropy."""
    return -(u.softmax(-1) * z.log_softmax(-1)).sum(-1)[labels != IGNORED].mean()


def symmetric_kl_loss(z: Tensor, u: Tensor, labels: Tensor, ratio: float) -> Tensor:
    reverse = kl(z.log_softmax(-1), u.log_softmax(-1))[labels != IGNORED].mean()
    return ratio * forward_kl_loss(z, u, labels) + (1 - ratio) * reverse


@pytest.mark.parametrize("ratio", [None, 1.0, 0.3, 0.0])
def test_torchtune_recipe(ratio):
    """(1 - kd_ratio) class + kd_ratio kd with labels shifted and one ignored label appended."""
    x, kd_ratio = Case(), 0.4
    labels = torch.hstack([x.labels[..., 1:], torch.full((3, 1), IGNORED)]).reshape(-1)
    z, u = x.z.flatten(0, 1), x.u.flatten(0, 1)
    kd = forward_kl_loss(z, u, labels) if ratio is None else symmetric_kl_loss(z, u, labels, ratio)
    truth = x.gradients((1 - kd_ratio) * F.cross_entropy(z, labels) + kd_ratio * kd)
    kind = {} if ratio is None else {"divergence": "symmetric_kl", "beta": ratio}
    result = x.ours(labels, omega=kd_ratio, **kind)
    found = x.gradients(result.loss)
    share = kd_ratio * (1.0 if ratio is None else ratio)
    found[0] = found[0] + share * result.stats.teacher_entropy[labels != IGNORED].mean()
    same(found, truth)


def test_torchtune_accumulation():
    """The recipe averages the means of its micro-batches; denom of the same calls is the mean over all tokens."""
    x = Case()
    counts = [(x.shifted().view(3, -1)[i] != IGNORED).sum() for i in range(3)]
    assert len(set(map(int, counts))) > 1
    z, u, labels = x.z, x.u, x.shifted().view(3, -1)
    recipe = sum(forward_kl_loss(z[i], u[i], labels[i]) for i in range(3)) / 3
    whole = forward_kl_loss(z.flatten(0, 1), u.flatten(0, 1), labels.flatten())

    def micro(i: int, **options):
        soft = {"teacher": TeacherLogits(u[i]), "omega": 1.0, "temperature": 1.0, "teacher_temperature": 1.0}
        return linear_distill_loss(x.hidden[i], x.head, labels[i], **soft, **options).loss

    same(x.gradients(sum(micro(i, denom=3 * counts[i]) for i in range(3)))[1:], x.gradients(recipe)[1:])
    same(x.gradients(sum(micro(i, denom=sum(counts)) for i in range(3)))[1:], x.gradients(whole)[1:])


# Gemma 3n


def test_gemma3n_block_itself():
    """The library's LAuReL block and what the layer makes of it, from the weights under their own names."""
    from tests.integrations.tiny_models import gemma3n

    layer = gemma3n().double().model.layers[0]
    stream, attention = (torch.randn(2, 7, 32, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        n, t = layer.input_layernorm(stream), layer.post_attention_layernorm(attention)
        u = (stream + t + layer.laurel(n)) / math.sqrt(2)
        w = dict(layer.named_parameters())
        out = effkern.laurel_residual(
            t, n, scale=2**-0.5, down=w["laurel.linear_left.weight"].t(), up=w["laurel.linear_right.weight"].t(),
            low_rank_norm=w["laurel.post_laurel_norm.weight"], low_rank_eps=1e-3, addends=(stream,),
            norm_weight=w["pre_feedforward_layernorm.weight"], norm_eps=1e-3, impl="reference",
        )  # fmt: skip
        # The library's norms round to float32 inside.
        assert rel_err(out.y, u) < 1e-6
        assert rel_err(out.normed, layer.pre_feedforward_layernorm(u)) < 1e-6


# The tables


def rows_of(page: str) -> Iterator[dict[str, str]]:
    """Rows of the tables whose first column is "theirs", by their heads."""
    heads: list[str] = []
    for line in (PAGES / f"{page}.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            heads = []
        elif cells[0] == "theirs":
            heads = cells
        elif heads and not set(line) <= set("|- "):
            assert len(cells) == len(heads), line
            yield dict(zip(heads, cells))


def held(names: str, default: str, parameters: dict[str, inspect.Parameter]) -> int:
    """How many names in backticks have the default that stands beside them; those without one are left out."""
    known = [parameters[name] for name in re.findall(r"`(\w+)`", names) if name in parameters]
    try:
        values = ast.literal_eval(default.strip("`"))
    except (SyntaxError, ValueError):
        return 0
    values = values if len(known) > 1 else (values,)
    for parameter, value in zip(known, values if known else ()):
        assert parameter.default == value, (parameter, value)
    return len(known)


OURS: dict[str, Callable] = dict.fromkeys(("liger", "torchtune", "trl-gkd"), linear_distill_loss)
OURS |= {"distributed-shampoo": Shampoo, "lora-rite": LoRARite, "gemma3n": effkern.laurel_residual}
# Arguments of other functions that the tables name: LoraPair and TeacherHidden, torch's add_, global_count.
OTHERS = {"bias", "alpha", "averaged"}


@pytest.mark.parametrize("page", OURS)
def test_tables_name_options_and_defaults_that_we_have(page):
    rows = list(rows_of(page))
    assert len(rows) >= 7
    parameters = dict(inspect.signature(OURS[page]).parameters)
    for row in rows:
        for name in re.findall(r"(?<![\w.\"])(\w+)=", row["ours"]):
            assert name in parameters or name in OTHERS, (name, row["ours"])
    if page in ("distributed-shampoo", "lora-rite"):
        assert sum(held(row["ours"], row["our default"], parameters) for row in rows) >= 8


def test_tables_have_the_defaults_of_the_packages():
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    theirs = dict(inspect.signature(chunked.LigerFusedLinearJSDLoss.__init__).parameters)
    rows = [row for row in rows_of("liger") if "their default" in row]
    assert sum(held(row["theirs"], row["their default"], theirs) for row in rows) >= 7
