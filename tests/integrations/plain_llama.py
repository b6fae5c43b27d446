"""A Llama with LAuReL written out from the paper's formulas: whole products x A B, no look-ahead, nothing fused."""

import torch


def scalars(residual):
    if residual.weights is None:
        return 1.0, 1.0
    alpha, beta = 2.0 * residual.weights.softmax(0)
    return alpha, beta


def residual_of(residuals, i, branch, inputs):
    """alpha f + beta (x + sum_j gamma_j h(x_j)) for residual i; inputs: x_0 ... x_i of all residuals so far."""
    r = residuals[i]
    alpha, beta = scalars(r)
    x, rank = inputs[i], r.rank
    extra = 0.0
    if not r.kind.previous:
        extra = x @ r.down @ r.up if r.kind.low_rank else 0.0
    else:
        for j in range(r.num_previous + 1):
            h = inputs[i - j]
            if r.kind.shared:
                h = h @ r.down @ r.up
            elif r.kind.low_rank:
                # The matrix A_{i, j} is kept by the residual whose input it reads.
                h = h @ residuals[i - j].down[:, j * rank : (j + 1) * rank] @ r.up[j * rank : (j + 1) * rank]
            extra = extra + r.gamma[j] * h
    return alpha * branch + beta * (x + extra)


def logits(model, ids):
    """Of a model that apply_laurel changed; its residuals' parameters are read, their forward is not."""
    decoder = model.model
    residuals = [r for layer in decoder.layers for n, r in layer.named_children() if n.startswith("laurel_")]
    x = decoder.embed_tokens(ids)
    rope = decoder.rotary_emb(x, position_ids=torch.arange(ids.shape[1])[None])
    inputs = []

    def join(layer, name, branch, x):
        if not hasattr(layer, name):
            return x + branch
        inputs.append(x)
        return residual_of(residuals, len(inputs) - 1, branch, inputs)

    for layer in decoder.layers:
        f, _ = layer.self_attn(layer.input_layernorm(x), position_embeddings=rope, attention_mask=None)
        middle = join(layer, "laurel_attn", f, x)
        g = layer.mlp(layer.post_attention_layernorm(middle))
        if hasattr(layer, "laurel_block"):
            x = join(layer, "laurel_block", f + g, x)
        else:
            x = join(layer, "laurel_mlp", g, middle)
    return model.lm_head(decoder.norm(x))
