"""lm-evaluation-harness: its tasks on a run of ours. Needs the extra `eval`; `effkern eval --tasks` imports it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from effkern.data.tokenizer import TextEncoder
from effkern.models import Decoder, generate
from effkern.train.scoring import score_continuations


class EffkernLM(TemplateLM):
    """A decoder and its tokenizer as the harness sees a model; end of text is what stands before a first token."""

    def __init__(
        self, model: Decoder, encoder: TextEncoder, *, batch_size: int = 16, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.model, self.encoder, self.batch_size, self.dtype = model, encoder, batch_size, dtype

    @property
    def eot_token_id(self) -> int:
        return self.encoder.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.encoder.encode([string])[0]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        found = score_continuations(self.model, pairs, batch_size=self.batch_size, dtype=self.dtype)
        return [(score.log_likelihood, score.greedy) for score in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's length."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.config.max_seq_len,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._scores(pairs)):
            totals[owner] += log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the texts in `until`."""
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = self.model.config.max_seq_len
        fresh = min(int(options.get("max_gen_toks", 256)), limit - 1)
        ids = (self.tok_encode(context) or [self.eot_token_id])[-(limit - fresh) :]
        sampled = bool(options.get("do_sample", False))
        tokens = generate(
            self.model,
            torch.tensor([ids], device=next(self.model.parameters()).device),
            fresh,
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_k=options.get("top_k") or None,
            top_p=options.get("top_p"),
            eos=self.eot_token_id,
        )[0, len(ids) :].tolist()
        if self.eot_token_id in tokens:
            tokens = tokens[: tokens.index(self.eot_token_id)]
        return cut(self.encoder.tokenizer.decode(tokens), stops)


def cut(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first of `stops`."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def run_tasks(
    model: EffkernLM,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int = 0,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of the harness.

    Args:
        tasks: names the harness knows, or that YAML files in `folder` define. limit: documents a task; 0 is all.
        num_fewshot: None takes the task's.

    Raises:
        ValueError: a task is unknown.
    """
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"tasks must be known to lm-evaluation-harness or defined in --task-dir, got {unknown}")
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit or None,
        num_fewshot=num_fewshot,
        log_samples=False,
    )
    assert found is not None
    return {
        task: {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
        for task, values in found["results"].items()
    }
