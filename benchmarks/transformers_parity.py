"""Causal language models of transformers with `patch` against themselves without it.

    python -m benchmarks.transformers_parity                 the table of parity; exit code 1 where it does not hold
    python -m benchmarks.transformers_parity --step          time and peak memory of a fine-tuning step, with and
        [--rounds N] [--threads N] [--json FILE]             without a teacher, in float32

parity: random weights, every architecture that patch covers, softcaps, scales and biases not neutral. logits: without
labels, as generate computes them. loss, gradients: relative error to the library's formula in float64, of the patched
model / of the unpatched one (gradients: the largest of all parameters). state, undone: names and bits of the state dict
while patched (of what was there before), and of everything after unpatch.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

# First, as it sets the thread policy before torch is imported.
from benchmarks import runner  # isort: skip

import torch
import transformers
from torch import Tensor, nn

from effkern.integrations.transformers import patch, teacher_hidden, unpatch

VOCAB, WIDTH, LAYERS = 97, 32, 4
EPS = torch.finfo(torch.float32).eps
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
GEMMA3N: dict[str, Any] = {
    "intermediate_size": [48] * LAYERS, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2, "laurel_rank": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
    "sliding_window": 16, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "final_logit_softcapping": 3.0,
    "head_dim": 8,
}  # fmt: skip
# What is not LlamaConfig's, and what would be neutral otherwise.
OWN: dict[str, dict[str, Any]] = {
    "Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "Gemma": {"head_dim": 8}, "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0}, "Gemma3": {"head_dim": 8},
    "Gemma3n": GEMMA3N, "Phi": {}, "Cohere": {"logit_scale": 0.3}, "Granite": {"logits_scaling": 2.5},
    "GPT2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0}, "GPTNeoX": {},
}  # fmt: skip
LAYERED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3")


def model_of(family: str, **changes: Any) -> Any:
    """<family>ForCausalLM with random weights, norms and biases included."""
    torch.manual_seed(0)
    text = "TextConfig" if family.startswith("Gemma3") else "Config"
    config = getattr(transformers, family + text)(**{**SIZES, **OWN[family], **changes})
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def settings(family: str) -> dict[str, dict[str, Any]]:
    """Neutral arguments of patch by what the table calls them."""
    found: dict[str, dict[str, Any]] = {"loss": {}}
    if family in LAYERED:
        found |= {"loss, laurel": {"laurel": "rw+lr"}, "loss, loop": {"loop": (1, 3, 1)}}
    if family == "Gemma3n":
        found["loss, laurel"] = {"laurel": True}
    return found


def rel(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


Step = tuple[Tensor, dict[str, Tensor]]


def step(model: Any, loss: Callable[[], Tensor]) -> Step:
    model.zero_grad()
    value = loss()
    value.backward()
    return value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def exact(model: Any, inputs: dict[str, Tensor]) -> Step:
    """The library's formula on the logits of a float64 copy."""
    wide = copy.deepcopy(model).double()
    labels = inputs["labels"][:, 1:].flatten()

    def loss() -> Tensor:
        logits = wide(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels)

    return step(wide, loss)


def errors(found: Step, truth: Step) -> tuple[float, float]:
    return rel(found[0], truth[0]), max(rel(found[1][name], grad) for name, grad in truth[1].items())


def parity(family: str, options: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    model, inputs = model_of(family).train(), batch()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    logits = model(input_ids=inputs["input_ids"]).logits.detach()
    truth = exact(model, inputs)
    plain = errors(step(model, lambda: model(**inputs).loss), truth)
    patch(model, **options)
    now = model.state_dict()
    kept = all(torch.equal(now[name], t) for name, t in state.items())
    difference = rel(model(input_ids=inputs["input_ids"]).logits.detach(), logits)
    fast = errors(step(model, lambda: model(**inputs).loss), truth)
    unpatch(model)
    after = model.state_dict()
    undone = list(after) == list(state) and all(torch.equal(after[name], t) for name, t in state.items())
    undone &= torch.equal(model(input_ids=inputs["input_ids"]).logits, logits)
    # Layers that run another way round sums: as good as the library, within twice its error and 16 roundings.
    good = all(f <= max(2 * p, 16 * EPS) for f, p in zip(fast, plain)) and difference <= 16 * EPS
    good &= kept and undone and (difference == 0 or len(options) > 0)
    return {"logits": difference, "loss": (fast[0], plain[0]), "gradients": (fast[1], plain[1]), "state": kept,
            "undone": undone, "good": good}  # fmt: skip


def lines() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for family in OWN:
        for name, options in settings(family).items():
            yield family, name, parity(family, options)


def table() -> bool:
    """Print the table; True if every line holds."""
    print("| architecture | patched | logits | loss: ours / library's | gradients | state | undone | |")
    print("|---" * 8 + "|")
    every = True
    for family, name, row in lines():
        every &= row["good"]
        logits = "same bits" if row["logits"] == 0 else f"{row['logits']:.1e}"
        pairs = [f"{row[key][0]:.1e} / {row[key][1]:.1e}" for key in ("loss", "gradients")]
        same = ["same bits" if row[key] else "OTHER" for key in ("state", "undone")]
        print("| " + " | ".join([family, name, logits, *pairs, *same, "holds" if row["good"] else "FAILS"]) + " |")
    return every


# A fine-tuning step -------------------------------------------------------------------------------------------------

STEP: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64,
    "max_position_embeddings": 512,
}  # fmt: skip
ROWS, LENGTH, TEMPERATURE = 2, 512, 2.0
VARIANTS = ("library", "patched", "library, teacher", "patched, teacher")


def by_hand(z: Tensor, u: Tensor, labels: Tensor) -> Tensor:
    """Half cross entropy, half forward KL at a temperature, as scripts write it."""
    z, u, labels = z[:, :-1].flatten(0, 1).float(), u[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    log_q, log_p = (torch.log_softmax(x / TEMPERATURE, -1) for x in (z, u))
    soft = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return 0.5 * soft + 0.5 * nn.functional.cross_entropy(z, labels)


def stepper(variant: str) -> Callable[[], Tensor]:
    """Forward, backward and AdamW of one variant."""
    model, teacher = model_of("Llama", **STEP).train(), model_of("Llama", **STEP).eval()
    ids = torch.randint(3, STEP["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    if variant.startswith("patched"):
        patch(model, {"temperature": TEMPERATURE, "teacher_temperature": TEMPERATURE, "omega": 0.5})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def loss() -> Tensor:
        if variant == "patched, teacher":
            return model(input_ids=ids, labels=ids, teacher=teacher_hidden(teacher, input_ids=ids)).loss
        if variant == "library, teacher":
            with torch.no_grad():
                u = teacher(input_ids=ids).logits
            return by_hand(model(input_ids=ids).logits, u, ids)
        return model(input_ids=ids, labels=ids).loss

    def run() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return run


def steps(rounds: int, threads: int) -> list[str]:
    """Print the tables of a step; result lines."""
    runs = {name: stepper(name) for name in VARIANTS}
    for kind in ("", ", teacher"):
        ours, theirs = runs[f"patched{kind}"]().item(), runs[f"library{kind}"]().item()
        if abs(ours - theirs) > 1e-4 * abs(theirs):
            raise RuntimeError(f"the loss of a step must be that of the library, {theirs}, got {ours}")
    timings = runner.interleave(runs, rounds)
    extra = {}
    for name in VARIANTS:
        arguments = ("--peak", name, "--threads", str(threads))
        extra[name] = {"peak_mib": int(runner.in_fresh_process("benchmarks.transformers_parity", *arguments)) / 2**20}
    case = {"vocab": STEP["vocab_size"], "width": STEP["hidden_size"], "tokens": ROWS * LENGTH}
    print(f"a step: Llama, {case}, {threads} threads")
    print(runner.table(timings, "library", extra))
    return runner.result_lines("transformers_step", case, timings, extra)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="store_true", help="time and memory of a step in place of the table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="append result lines of --step to FILE")
    parser.add_argument("--peak", choices=VARIANTS, help="print the bytes of one step of a variant, and stop")
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads)
    if a.peak:
        print(runner.peak_memory(lambda: stepper(a.peak)))
        return 0
    if not a.step:
        return 0 if table() else 1
    found = steps(a.rounds, a.threads)
    if a.json:
        with open(a.json, "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
