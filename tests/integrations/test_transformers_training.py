"""A patched model in what people train with: Trainer, accelerate, PEFT, FSDP2, against the unpatched model in it."""

import copy
import types

import pytest
import torch
from torch import nn

import effkern
from effkern.integrations.transformers import DistillTrainer, patch, teacher_hidden, unpatch
from effkern.optim import LoRARite, find_pairs
from tests.distributed.spawn import spawn
from tests.integrations import sharded_worker
from tests.integrations.tiny_models import VOCAB, causal, tokens, transformers
from tests.numerics import rel_err

pytest.importorskip("accelerate")

KD = {"temperature": 2.0, "teacher_temperature": 2.0}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Its state, with the precision, belongs to the process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Distil(DistillTrainer, transformers.Trainer):
    pass


def rows(count=12, length=9, columns=None):
    ids = tokens(count, length)
    labels = ids.clone()
    labels[::3, :4] = -100
    extra = columns(count, length) if columns else {}
    return [
        {"input_ids": ids[i], "labels": labels[i], **{name: value[i] for name, value in extra.items()}}
        for i in range(count)
    ]


def arguments(folder, **changes):
    given = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 0.05,
        "optim": "sgd", "report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "per_device_eval_batch_size": 3, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**given, **changes})


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=["plain", "bf16", "gc"])
def test_trainer(options, tmp_path):
    """Accumulation over batches with other token counts: the same losses and weights as the unpatched model."""
    plain = causal("Llama")
    start, model, data = weights(plain), patch(copy.deepcopy(plain)), rows()
    logs = []
    for m in (plain, model):
        trainer = transformers.Trainer(m, arguments(tmp_path, **options), train_dataset=data, eval_dataset=data[:5])
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        logs[-1].append(trainer.evaluate()["eval_loss"])
    bound = 2e-3 if "bf16" in options else 2e-5
    torch.testing.assert_close(torch.tensor(logs[1]), torch.tensor(logs[0]), rtol=bound, atol=0.0)
    moved = weights(plain) - start
    assert moved.norm() > 1e-2
    assert rel_err(weights(model) - start, moved.double()) < (0.05 if "bf16" in options else 1e-4)
    unpatch(trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False))


def test_distill_trainer_against_a_loop_by_hand(tmp_path):
    """A live teacher, a schedule of omega, evaluation with its loss; the teacher stays as it was."""
    model, teacher, data = patch(causal("Llama"), KD), causal("Gemma2", hidden_size=48), rows()
    other, before = copy.deepcopy(model).train(), weights(teacher)

    def omega(step):
        return (0.9, 0.5, 0.0)[step]

    options = arguments(tmp_path, gradient_accumulation_steps=1)
    trainer = Distil(model, options, train_dataset=data, teacher=teacher.train(), omega=omega)
    assert not teacher.training
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(data, batch_size=2)
    trainer.train()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    for step in range(3):
        ids = torch.stack([data[2 * step + i]["input_ids"] for i in range(2)])
        labels = torch.stack([data[2 * step + i]["labels"] for i in range(2)])
        target = teacher_hidden(teacher, input_ids=ids)
        other(input_ids=ids, labels=labels, teacher=target, omega=omega(step)).loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert rel_err(weights(model), weights(other).double()) < 1e-6
    assert torch.equal(weights(teacher), before)
    # Beside a schedule of steps done, evaluation asks for the last.
    trainer.omega = 1.0
    assert trainer.evaluate(data[:4])["eval_loss"] > 0


def test_cached_labels_as_columns_of_a_data_set(tmp_path):
    """transformers' Trainer alone: the columns reach the loss, and change it."""

    def columns(count, length):
        logprobs, ids = torch.randn(count, length, VOCAB).log_softmax(-1).topk(5)
        return {"teacher_ids": ids, "teacher_logprobs": logprobs}

    model, data = patch(causal("Qwen2"), {**KD, "teacher_temperature": 1.0, "omega": 0.5}), rows(columns=columns)
    ids, labels, top, logprobs = (torch.stack([r[k] for r in data[:3]]) for k in data[0])
    want = model.train()(input_ids=ids, labels=labels, teacher=effkern.TeacherTopK(top, logprobs, "tail_bucket")).loss
    trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=data)
    trainer._set_signature_columns_if_needed()
    assert {"teacher_ids", "teacher_logprobs", "labels", "input_ids"} <= set(trainer._signature_columns)
    assert trainer.label_names == ["labels"]
    got = trainer.evaluate(data[:3])["eval_loss"]
    assert got == pytest.approx(want.item(), rel=1e-5)
    plain = model(input_ids=ids, labels=labels).loss.item()
    assert abs(got - plain) > 1e-2


@pytest.mark.parametrize(
    ("model", "teacher", "kind", "message"),
    [
        (lambda: causal("Llama"), lambda: causal("Llama"), TypeError, "model must be patched with a distill_loss"),
        (lambda: patch(causal("Llama")), lambda: "gpt2", TypeError, "Distil: teacher must be a model, got str"),
        (lambda: patch(causal("Llama")), lambda: nn.Linear(2, 2), ValueError, "causal language model of .* got Linear"),
        (lambda: patch(causal("Llama")), lambda: causal("Llama", vocab_size=50), ValueError,
         "the vocabulary of teacher must cover the student's 61 tokens .* got 50"),
    ],
)  # fmt: skip
def test_distill_trainer_bad_input(model, teacher, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        Distil(model(), arguments(tmp_path), train_dataset=rows(), teacher=teacher())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_liger_kernel": True}, "Distil: use_liger_kernel must be False, .* got True"),
        ({"label_smoothing_factor": 0.1}, "Distil: label_smoothing_factor must be 0, .* got 0.1"),
        ({"_n_gpu": 2}, "Distil: the GPUs of a process must be 1: nn.DataParallel .* got n_gpu=2"),
    ],
)
def test_training_arguments_that_distil_trainer_refuses(changes, message, tmp_path):
    given = arguments(tmp_path)
    assert given.n_gpu <= 1
    for name, value in changes.items():
        setattr(given, name, value)
    with pytest.raises(ValueError, match=message):
        Distil(patch(causal("Llama")), given, train_dataset=rows(), teacher=causal("Llama"))


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_a_forward_put_over_the_patched_one(options, tmp_path):
    """Mixed precision and compilation wrap it and train; another package's forward would ignore the teacher."""
    model = patch(causal("Llama", num_hidden_layers=1), KD)
    given = arguments(tmp_path, max_steps=1, **options)
    trainer = Distil(model, given, train_dataset=rows(), teacher=causal("Qwen2"), omega=1.0)
    trainer.train()
    assert trainer.state.global_step == 1

    def other(self, input_ids=None, labels=None, **kwargs):
        return transformers.LlamaForCausalLM.forward(self, input_ids=input_ids, labels=labels)

    model.forward = types.MethodType(other, model)
    with pytest.raises(RuntimeError, match=rf"Distil: the model must run the forward of patch .* of {__name__}"):
        trainer.train()


def test_accelerate(tmp_path):
    """prepare with mixed precision, accumulation, clipping; unwrapped, it comes off again."""
    from accelerate import Accelerator

    plain = causal("Llama").train()
    found = []
    for model in (copy.deepcopy(plain), patch(copy.deepcopy(plain))):
        accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        torch.manual_seed(1)
        for _ in range(4):
            with accelerator.accumulate(prepared):
                ids = tokens(2, 8)
                loss = prepared(input_ids=ids, labels=ids).loss
                assert loss.dtype == torch.float32
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        found.append(weights(model) - weights(plain))
        if model.__dict__.get("effkern_patch"):
            with pytest.raises(ValueError, match=r"unpatch: model must be as patch left it \(undo sharding, prepare"):
                unpatch(model)
            unpatch(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))
        else:
            with pytest.raises(ValueError, match=r"must have its class's forward \(patch before accelerate's prepare"):
                patch(prepared)
    assert found[0].norm() > 1e-2
    assert rel_err(found[1], found[0].double()) < 0.05


# PEFT ------------------------------------------------------------------------------------------------------------


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


def adapter_grads(model, inputs):
    model.train().zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_peft(order, saved):
    base, ids = causal("Llama"), tokens(3, 9)
    inputs = {"input_ids": ids, "labels": ids}
    want = adapter_grads(adapted(copy.deepcopy(base), modules_to_save=saved), inputs)
    if order == "after" and saved:
        with pytest.raises(TypeError, match=r"must be a torch.nn.Linear .* got peft.utils.other.ModulesToSaveWrapper"):
            patch(adapted(copy.deepcopy(base), modules_to_save=saved))
        return
    model = adapted(patch(base), modules_to_save=saved) if order == "before" else patch(adapted(base))
    got = adapter_grads(model, inputs)
    assert rel_err(got[0], want[0].double()) < 5e-6
    assert len(got[1]) == len(want[1])
    for grad, true in zip(got[1], want[1]):
        assert rel_err(grad, true.double()) < 2e-5
    LoRARite(find_pairs(model), lr=0.003, others="ignore").step()
    assert adapter_grads(model, inputs)[0] < got[0]
    unpatch(model)
    assert type(model.get_base_model()) is transformers.LlamaForCausalLM
    assert model(**inputs).logits is not None


def test_an_adapter_on_the_output_layer_is_refused():
    peft = pytest.importorskip("peft")
    ids = tokens(2, 5)
    model = peft.get_peft_model(patch(causal("Llama")), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(TypeError, match=r"the output layer must be the one that patch has seen.* got peft.tun"):
        model.train()(input_ids=ids, labels=ids)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Linear .* got peft.tuners.lora"):
        patch(peft.get_peft_model(causal("Llama"), peft.LoraConfig(r=2, target_modules=["lm_head"])))


# FSDP2 -----------------------------------------------------------------------------------------------------------


def test_fsdp2_in_two_processes():
    """Output layer in the root's group, tied, and in one of its own: the weights of one process with all rows."""
    found = spawn(2, sharded_worker.work)
    for case in sharded_worker.CASES:
        want = sharded_worker.train(sharded_worker.model_of(case), slice(0, 4))
        steps = sharded_worker.STEPS
        for step in range(steps):
            both = torch.stack([rank[case][step] for rank in found]).mean()
            assert rel_err(both, want[step].double()) < 1e-5, case
        for rank in found:
            assert "must be as patch left it (undo sharding" in rank[f"{case}-unpatch"]
            assert "must be unchanged (unpatch first), got one with distill_loss" in rank[f"{case}-patch"]
            for got, true in zip(rank[case][steps:], want[steps:], strict=True):
                assert rel_err(got, true.double()) < 1e-5, case
