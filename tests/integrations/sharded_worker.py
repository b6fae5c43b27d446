"""What each of two processes does for test_transformers_training.py: a patched model under FSDP2."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from effkern import TeacherLogits
from effkern.integrations.transformers import patch, unpatch
from tests.integrations.tiny_models import VOCAB, causal, tokens

KD: dict[str, Any] = {"temperature": 1.0, "teacher_temperature": 1.0, "omega": 0.5}
STEPS = 2
CASES = {"tied": (True, False), "head-apart": (False, True)}


def model_of(case: str) -> Any:
    torch.manual_seed(3)
    tied, _ = CASES[case]
    return patch(causal("Llama", num_hidden_layers=1, tie_word_embeddings=tied).train(), KD)


def train(model: Any, part: slice) -> list[Tensor]:
    """Losses, and the weights after the last step; each process sees its part of the batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        ids, teacher = tokens(4, 8), torch.randn(4, 8, VOCAB)
        loss = model(input_ids=ids[part], labels=ids[part], teacher=TeacherLogits(teacher[part])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    weights = (p.detach() for p in model.parameters())
    return losses + [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in weights]


def work(rank: int, world: int) -> dict[str, Any]:
    mesh, found = init_device_mesh("cpu", (world,)), {}
    for case, (_, apart) in CASES.items():
        model = model_of(case)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if apart:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found[case] = train(model, slice(rank * 2, rank * 2 + 2))
        try:
            unpatch(model)
        except ValueError as error:
            found[f"{case}-unpatch"] = str(error)
        try:
            patch(model)
        except ValueError as error:
            found[f"{case}-patch"] = str(error)
    return found
