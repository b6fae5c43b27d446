"""A small Llama learns from a larger Qwen in transformers' Trainer, both with random weights at first.

    python examples/distil.py [--steps N]

The teacher is trained on bytes of Python's documentation, then teaches a student of half its width through
transformers' Trainer. Neither model's logits exist in the student's steps: loss and gradients come from hidden states.
Printed: cross entropy on held-out text, of the teacher, of the distilled student, and of a student without a teacher.
"""

import argparse
import copy
import tempfile

import torch
from corpus import VOCAB, batches, held_out
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from effkern.integrations.transformers import DistillTrainer, patch

SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


class Distil(DistillTrainer, Trainer):
    """transformers' Trainer with a live teacher."""


def loss_on_held_out(model: nn.Module) -> float:
    ids = held_out()
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=ids).loss.item()


def fit(kind: type[Trainer], model: nn.Module, steps: int, seed: int, **more: object) -> float:
    rows = [{"input_ids": row, "labels": row} for batch in batches(steps, seed=seed) for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, per_device_train_batch_size=8, max_steps=steps, learning_rate=3e-3, report_to=[], use_cpu=True,
            save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = kind(model, options, train_dataset=rows, **more)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return loss_on_held_out(model)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="of the student; the teacher has three times as many")
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    teacher = patch(Qwen2ForCausalLM(Qwen2Config(hidden_size=96, intermediate_size=192, **SIZES)))
    print(f"teacher: {fit(Trainer, teacher, 3 * steps, seed=1):.3f} nats per byte")

    student = LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=96, **SIZES))
    alone = patch(copy.deepcopy(student))
    patch(student, {"temperature": 1.0, "teacher_temperature": 1.0})
    taught = fit(Distil, student, steps, seed=2, teacher=teacher, omega=0.9)
    print(f"student with the teacher: {taught:.3f}")
    print(f"student alone: {fit(Trainer, alone, steps, seed=2):.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
