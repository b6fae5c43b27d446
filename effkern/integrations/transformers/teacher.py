"""Another transformers model as the teacher: its hidden states and its output layer, never its logits."""

from typing import Any

import torch
from torch import nn

from effkern.integrations.transformers.heads import causal_model, head_of
from effkern.ops.distill import TeacherHidden


@torch.no_grad()
def teacher_hidden(model: nn.Module, **inputs: Any) -> TeacherHidden:
    """What `model` says of the next token at every position: [batch, length, hidden size] and its output layer.

    u = softcap(logit_scale (h W^T + b)) with softcap and scale of the model's config; pass the result as `teacher` to
    a patched model, which may have another hidden size and another padding of the vocabulary.

    Args:
        model: a causal language model that `patch` covers, patched or not, or a PEFT model of one. Its training mode is
            left as it is: eval() it once.
        inputs: arguments of its backbone: input_ids, attention_mask, position_ids ... Arguments of a loss (labels) are
            left out.

    Raises:
        ValueError, TypeError: another architecture, or an output layer that is quantized or replaced (pass logits of
            such a model as effkern.TeacherLogits).

    Memory: the hidden states. Sharded models: shard the backbone by itself; the output layer is gathered.
    """
    op = "teacher_hidden"
    causal: Any = causal_model(op, model)
    head = head_of(op, causal)
    given = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
    hidden = getattr(causal, head.family.backbone)(**given, use_cache=False, return_dict=True).last_hidden_state
    layer = causal.get_output_embeddings()
    weight, bias = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (layer.weight, layer.bias))
    # Autocast computes hidden states in a type of its own.
    return TeacherHidden(hidden.to(weight.dtype), weight, bias, head.softcap, head.logit_scale)
