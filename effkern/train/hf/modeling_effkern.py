"""A decoder of effkern as a model of transformers. `effkern export` puts this file beside the weights, and
`from_pretrained(..., trust_remote_code=True)` runs it; the package effkern must be installed.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from effkern.models import Decoder, DecoderConfig
from effkern.ops.distill import linear_distill_loss
from effkern.train.mapping import overlay


class EffkernConfig(PretrainedConfig):
    """`effkern` holds the fields of effkern.models.DecoderConfig."""

    model_type = "effkern"

    def __init__(self, effkern: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.effkern = effkern or {}
        super().__init__(**kwargs)


class EffkernForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits, loss and generation. Keys are not cached here: `effkern generate` caches them."""

    config_class = EffkernConfig
    base_model_prefix = "decoder"

    def __init__(self, config: EffkernConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(overlay(DecoderConfig(), config.effkern, source="config.json"))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The decoder has filled itself."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """
        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T]; padding may stand at the right alone, where a causal model does not see it.
            labels: int64 [B, T], as input_ids with -100 where there is none; shifted here.
            num_items_in_batch: what the loss is divided by; None: the labels that are not -100.

        Raises:
            ValueError: padding at the left; a sequence beyond max_seq_len.
        """
        if attention_mask is not None and bool((attention_mask.diff(dim=-1) > 0).any()):
            raise ValueError("EffkernForCausalLM: attention_mask must be 0 at the right alone, got zeros before ones")
        hidden = self.decoder(input_ids)
        loss = None
        if labels is not None:
            loss = linear_distill_loss(
                hidden[:, :-1].flatten(0, 1),
                self.decoder.head_weight,
                labels[:, 1:].flatten(),
                ignore_index=-100,
                vocab_valid=self.decoder.vocab_valid,
                denom=None if num_items_in_batch is None else int(num_items_in_batch),
            ).loss
        return CausalLMOutput(loss=loss, logits=self.decoder.logits(hidden))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("EffkernForCausalLM: generate needs prompts of equal length, got a mask with zeros")
        return {"input_ids": input_ids}
