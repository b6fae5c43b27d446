"""Every rule of linear_distill_loss's arguments: the error's type, and that it names argument, rule and fact."""

import pytest
import torch

from effkern import TeacherHidden, TeacherLogits, linear_distill_loss

N, D, V = 4, 8, 10
SOFT = {"omega": 0.5, "temperature": 1.0, "teacher_temperature": 1.0}


def base(**changes):
    arguments = {
        "hidden": torch.randn(N, D),
        "weight": torch.randn(V, D),
        "labels": torch.arange(N),
        "teacher": TeacherLogits(torch.randn(N, V)),
        **SOFT,
    }
    return {**arguments, **changes}


def hidden_teacher(**changes):
    fields = {"hidden": torch.randn(N, 3), "weight": torch.randn(V, 3), **changes}
    return TeacherHidden(**fields)


NO_TEACHER = {"teacher": None, "omega": None, "temperature": None, "teacher_temperature": None}

VALUE_ERRORS = [
    ({"hidden": torch.randn(N, 2, D)}, r"hidden must have 2 dimension\(s\), got shape \(4, 2, 8\)"),
    ({"hidden": torch.randn(N, 0), "weight": torch.randn(V, 0)}, r"hidden must have at least one column"),
    ({"weight": torch.randn(V, D + 1)}, r"weight must have shape \[\*, 8\], got \[10, 9\]"),
    ({"weight": torch.randn(0, D)}, r"weight must have at least one row"),
    ({"labels": torch.arange(N + 1)}, r"labels must have shape \[4\], got \[5\]"),
    ({"labels": torch.tensor([0, 1, V, 2])}, r"labels must lie in \[0, 10\) or be ignore_index \(-100\), got 10"),
    ({"labels": torch.tensor([0, -1, 1, 2])}, r"labels must lie in \[0, 10\).*got -1"),
    ({"labels": torch.tensor([0, 9, 1, 2]), "vocab_valid": 9}, r"labels must lie in \[0, 9\).*got 9"),
    ({"labels": torch.zeros(N, dtype=torch.int64, device="meta")}, r"labels must be on cpu like hidden, got meta"),
    ({"bias": torch.randn(V - 1)}, r"bias must have shape \[10\], got \[9\]"),
    ({"weights": torch.ones(N, 1)}, r"weights must have 1 dimension\(s\), got shape \(4, 1\)"),
    ({"teacher": TeacherLogits(torch.randn(N + 1, V))}, r"teacher.logits must have shape \[4, \*\], got \[5, 10\]"),
    ({"teacher": TeacherLogits(torch.randn(N, V - 1))}, r"teacher.logits must cover vocab_valid \(10\) .*, got 9"),
    ({"teacher": TeacherLogits(torch.randn(V, N).t())}, r"teacher.logits must have stride 1 along the vocabulary"),
    ({"teacher": hidden_teacher(weight=torch.randn(V - 1, 3))}, r"teacher.weight must cover vocab_valid \(10\)"),
    ({"teacher": hidden_teacher(weight=torch.randn(V, 4))}, r"teacher.weight must have shape \[\*, 3\], got \[10, 4\]"),
    ({"teacher": hidden_teacher(hidden=torch.randn(N - 1, 3))}, r"teacher.hidden must have shape \[4, \*\]"),
    ({"teacher": hidden_teacher(bias=torch.randn(V + 1))}, r"teacher.bias must have shape \[10\], got \[11\]"),
    ({"teacher": hidden_teacher(softcap=0.0)}, r"teacher.softcap must be > 0 and finite, got 0.0"),
    ({"omega": 1.5}, r"omega must lie in \[0, 1\], got 1.5"),
    ({"omega": -0.1}, r"omega must lie in \[0, 1\], got -0.1"),
    ({"omega": float("nan")}, r"omega must lie in \[0, 1\], got nan"),
    ({"omega": torch.tensor(1.25)}, r"omega must lie in \[0, 1\], got 1.25"),
    ({"omega": torch.ones(N + 1)}, r"omega must have shape \[4\], got \[5\]"),
    ({"omega": None}, r"omega must be given with a teacher"),
    ({**NO_TEACHER, "omega": 0.5}, r"omega must be None or 0 without a teacher, got 0.5"),
    ({"temperature": 0.0}, r"temperature must be > 0 and finite, got 0.0"),
    ({"temperature": None}, r"temperature must be given with a teacher"),
    ({"teacher_temperature": -1}, r"teacher_temperature must be > 0 and finite, got -1"),
    ({"teacher_temperature": float("inf")}, r"teacher_temperature must be finite, got inf"),
    ({"temperature": 1e-39}, r"temperature must lie in \[1e-30, 1e\+30\], got 1e-39"),
    ({"softcap": 1e-40}, r"softcap must lie in \[1e-30, 1e\+30\], got 1e-40"),
    ({"ignore_index": 2**70}, r"ignore_index must lie in \[-9223372036854775808, 9223372036854775807\], got 11805"),
    ({"label_smoothing": 1.01}, r"label_smoothing must lie in \[0, 1\], got 1.01"),
    ({"z_loss": -1e-4}, r"z_loss must be >= 0 and finite, got -0.0001"),
    ({"softcap": 0}, r"softcap must be > 0 and finite, got 0"),
    ({"logit_scale": float("inf")}, r"logit_scale must be finite, got inf"),
    ({"vocab_valid": 11}, r"vocab_valid must lie in \[1, 10\], got 11"),
    ({"vocab_valid": 0}, r"vocab_valid must lie in \[1, 10\]"),
    ({"divergence": "kl"}, r"divergence must be one of 'forward_kl', 'reverse_kl', .*'cosine', got 'kl'"),
    ({"reduction": "avg"}, r"reduction must be 'none', 'sum' or 'mean', got 'avg'"),
    ({"denom": 0}, r"denom must be > 0 and finite, got 0"),
    ({"denom": 3.0, "reduction": "sum"}, r"denom must be None with reduction='sum', got 3.0"),
    ({"denom": torch.ones(2)}, r"denom must be a number or a 0-d tensor on cpu, got shape \[2\]"),
    ({"impl": "fast"}, r"impl must be one of 'auto', 'cpp', 'triton', 'reference', got 'fast'"),
    ({"chunk_bytes": 0}, r"chunk_bytes must lie in \[1, \d+\], got 0"),
]

TYPE_ERRORS = [
    ({"hidden": [[1.0]]}, r"hidden must be a tensor, got list"),
    ({"hidden": torch.zeros(N, D, dtype=torch.int64)}, r"hidden must have one of the dtypes float32, .*, got int64"),
    ({"weight": torch.randn(V, D).bfloat16()}, r"weight must have the dtype of hidden \(float32\) outside autocast"),
    ({"labels": torch.zeros(N)}, r"labels must have one of the dtypes int64, int32, got float32"),
    ({"weights": torch.ones(N, dtype=torch.bool)}, r"weights must have one of the dtypes .*, got bool"),
    ({"teacher": torch.randn(N, V)}, r"teacher must be one of the Teacher classes or None, got Tensor"),
    ({"teacher": TeacherLogits(torch.zeros(N, V, dtype=torch.int32))}, r"teacher.logits must have one of the dtypes"),
    ({"omega": "0.5"}, r"omega must be a number, got str"),
    ({"temperature": True}, r"temperature must be a number, got bool"),
    ({"vocab_valid": 5.0}, r"vocab_valid must be an int, got float"),
    ({"chunk_bytes": 1e6}, r"chunk_bytes must be an int, got float"),
    ({"ignore_index": 1.0}, r"ignore_index must be an int, got float"),
]


@pytest.mark.parametrize(("changes", "message"), VALUE_ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_value_errors(changes, message):
    with pytest.raises(ValueError, match=r"^linear_distill_loss: " + message):
        linear_distill_loss(**base(**changes))


@pytest.mark.parametrize(("changes", "message"), TYPE_ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_type_errors(changes, message):
    with pytest.raises(TypeError, match=r"^linear_distill_loss: " + message):
        linear_distill_loss(**base(**changes))


def test_an_explicit_implementation_never_falls_back(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        NotImplementedError, match=r"impl='triton' cannot run on cpu: Triton kernels need a CUDA tensor"
    ):
        linear_distill_loss(**base(impl="triton"))
    wide = {k: v.double() for k, v in base().items() if k in ("hidden", "weight")}
    with pytest.raises(NotImplementedError, match=r"impl='cpp' (does not cover float64 tensors|cannot run)"):
        linear_distill_loss(**base(**wide, impl="cpp"))


def test_int32_labels_and_custom_ignore_index_are_legal():
    arguments = base(labels=torch.tensor([0, 3, 1, 2]), ignore_index=3)
    want = linear_distill_loss(**arguments).loss
    got = linear_distill_loss(**{**arguments, "labels": arguments["labels"].int()}).loss
    assert torch.equal(got, want)
