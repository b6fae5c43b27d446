"""Going on from a run with the LoRARite of the package pytorch-optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effkern.optim.lora.rite import LoRARite

_KEYS = ("step", "v_l", "v_r", "m_l", "m_r", "basis_l", "basis_r", "escape_l", "escape_r")


@torch.no_grad()
def import_port_state(optimizer: LoRARite, state_dict: Mapping[str, Any]) -> None:
    """Take moments, bases and step counts from a state_dict of pytorch_optimizer's LoRARite (checked with 4.1.0).

    The parameters must hold the values of the same moment, and the pairs stand in the same order, A before B, as
    matrices A [r, n] and B [m, r] (its lora_l_dim=0, lora_r_dim=-1). Its V in any basis becomes eigenvalues in a turned
    one, its M turns with it, and its stored bases give the transport to the bases of the present factors, so that the
    next step is the one that the port would have made, rounding apart. Options and learning rates are not taken over.

    Raises:
        ValueError: another number of pairs, missing entries, other shapes, or factors that are no matrices of that
            layout; nothing was changed.
    """
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    pairs = [pair for group in optimizer.param_groups for pair in optimizer.pairs(group)]
    if len(order) != 2 * len(pairs):
        raise ValueError(f"import_port_state: state must be of {len(pairs)} pairs, got {len(order)} parameters")
    entries: dict[int, Mapping[str, Any]] = {}
    for number, pair in enumerate(pairs):
        if (pair.A.dim(), pair.B.dim(), pair.rank_dim_A, pair.rank_dim_B) != (2, 2, 0, 1):
            raise ValueError(f"import_port_state: {pair.name} must be A [r, n] and B [m, r], got another layout")
        entry = state_dict["state"].get(order[2 * number])
        if entry is None:
            # It has had no gradient yet.
            continue
        if any(key not in entry for key in _KEYS):
            raise ValueError(f"import_port_state: state of {pair.name} must have {_KEYS}, got {sorted(entry)}")
        rank, rows = pair.rank, (pair.A.shape[1], pair.B.shape[0])
        for side, count in zip("lr", rows):
            shapes = {f"m_{side}": (count, rank), f"basis_{side}": (count, rank), f"v_{side}": (rank, rank)}
            for key, shape in shapes.items():
                got = tuple(entry[key].shape)
                if got != shape:
                    raise ValueError(f"import_port_state: {key} of {pair.name} must have shape {shape}, got {got}")
        entries[id(pair.A)] = entry
    optimizer.rebuild()
    for _, run in optimizer._prepared():
        for number, pair in enumerate(run.pairs):
            if id(pair.A) not in entries:
                continue
            entry = entries[id(pair.A)]
            for i, side, other in ((2 * number, "l", "r"), (2 * number + 1, "r", "l")):
                _take(run.group, i, entry, side, entry[f"basis_{other}"])


def _take(group: Any, i: int, entry: Mapping[str, Any], side: str, basis_other: Tensor) -> None:
    """State of factor i, and the transport of its partner i ^ 1, whose basis before the last step was `basis_other`."""
    device = group.whiten.device

    def wide(x: Any) -> Tensor:
        return torch.as_tensor(x).to(device, torch.float64)

    V = wide(entry[f"v_{side}"])
    values, E = torch.linalg.eigh((V + V.T) / 2)
    moment = wide(entry[f"m_{side}"]) @ E
    group.moments[i].copy_(moment.T if group.wide[i] else moment)
    group.second[i] = values.clamp_min(0)
    group.escaped[i] = wide(entry[f"escape_{side}"]).reshape(())
    group.steps[i] = int(entry["step"])
    partner = group.factors[i ^ 1]
    tall = (partner.T if group.wide[i ^ 1] else partner).double()
    group.transport[i ^ 1] = (tall @ group.whiten[i ^ 1]).T @ (wide(basis_other) @ E)
