"""What loop_layers must equal: a longer model of the library's own layers, whose repeated layers share parameters."""

import copy

import torch


def unrolled(model, start, stop, loops, damping=None):
    """`model` (unchanged, not looped) with layers start ... stop - 1 written out `loops` times.

    Parameters are the very tensors of `model`. The damped form is made by hooks around every repetition.
    """
    order = [
        *range(stop),
        *[i for _ in range(loops - 1) for i in range(start, stop)],
        *range(stop, len(model.model.layers)),
    ]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [model.config.layer_types[i] for i in order]
    longer = type(model)(config).eval()
    longer.load_state_dict({k: v for k, v in model.state_dict().items() if ".layers." not in k}, strict=False)
    longer.to(model.dtype)
    # The head too, where it is the embedding.
    for name, p in model.named_parameters(remove_duplicate=False):
        if ".layers." not in name:
            _put(longer, name, p)
    for index, source in enumerate(order):
        layer = copy.deepcopy(model.model.layers[source])
        for name, p in model.model.layers[source].named_parameters():
            _put(layer, name, p)
        layer.self_attn.layer_idx = index
        longer.model.layers[index] = layer
    if damping is not None:
        width = stop - start
        for t in range(loops):
            _damp(longer.model.layers[start + t * width], longer.model.layers[start + t * width + width - 1], damping)
    return longer


def _put(module, path, parameter):
    *parents, name = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    module._parameters[name] = parameter


def _damp(first, last, damping):
    seen = {}
    first.register_forward_pre_hook(lambda m, args: seen.__setitem__("h", args[0]))
    last.register_forward_hook(lambda m, args, out: seen["h"] + (out - seen["h"]) / damping)


@torch.no_grad()
def generation(model, ids, **options):
    """Tokens and the logits behind them."""
    out = model.generate(
        ids, max_new_tokens=7, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.sequences, torch.stack(out.logits)
