"""`generate` of Transformers for readers that learn: what they cannot do, and where a text goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode, StoppingCriteria, StoppingCriteriaList

from longread.config import UserError
from longread.transformers.cache import SessionCache
from longread.transformers.versions import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object

_CANNOT = "what a reader has learned cannot be taken back, so no text is tried and dropped; decode greedily or sample"
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class _Noting(StoppingCriteriaList):
    """All criteria. Tells a cache which rows had come to their end before the newest tokens, which are padding then."""

    def __init__(self, criteria: Any, cache: SessionCache) -> None:
        super().__init__(criteria)
        self._cache = cache
        self._done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        done: Tensor = super().__call__(input_ids, scores, **others)
        self._cache.ended = self._done
        self._done = done if self._done is None else self._done | done
        return done


class _Mark(StoppingCriteria):
    """Stops nothing; brings the cache to where the criteria are made."""

    def __init__(self, cache: SessionCache) -> None:
        self.cache = cache

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Generating(_Model):
    """`generate` for a reader: greedy or sampled, in batches, in chunks, on from a cache.

    Stands before GenerationMixin among the bases of a model.
    """

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        **others: Any,
    ) -> Any:
        """As `GenerationMixin.generate`. Every row is a session of its own, which reads no padding.

        Args:
            learn: False reads and writes with the weights as they are; not given: as the cache or the configuration
                says.
            cache: (before Transformers 5.24 `past_key_values`) a `SessionCache` to go on from, of `generate` or of
                `SessionCache.restore`. Then `inputs` are the whole text, of which the cache has read the beginning, or
                what is new alone.

        Raises:
            UserError: beams, an assistant or embeddings are asked for, or the inputs do not go on from the cache.
        """
        self._refuse_trials(generation_config, others)
        given = others.pop("cache", None)
        older = others.pop("past_key_values", None)
        cache = older if given is None else given
        if others.get("inputs_embeds") is not None:
            raise UserError("a reader reads token ids; give input_ids instead of inputs_embeds")
        if others.get("cache_implementation") is not None:
            raise UserError(
                f"cache_implementation is {others['cache_implementation']!r}; a reader has a cache of its own, so "
                "leave it out"
            )
        configured = [others.get("use_cache"), getattr(generation_config, "use_cache", None)]
        cached = next((x for x in (*configured, self.generation_config.use_cache) if x is not None), True)
        if cache is None and cached:
            cache = SessionCache(self, learn=others.get("learn"))
        if cache is not None:
            inputs = self._continued(cache, inputs, generation_config, others, cached)
            others[CACHE] = cache
            stopping_criteria = [*(stopping_criteria or ()), _Mark(cache)]
        try:
            return super().generate(
                inputs, generation_config, logits_processor, StoppingCriteriaList(stopping_criteria or ()), **others
            )
        finally:
            if cache is not None:
                cache.ended = None
                cache.rest()

    def generate_batch(self, *arguments: Any, **named: Any) -> Any:
        """Refused: raises `UserError`."""
        raise UserError(
            "continuous batching keeps keys and values in pages, a reader does not; use generate, or longread.Engine"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _refuse_trials(self, generation_config: Any, others: dict[str, Any]) -> None:
        """Refuses what Transformers would look for elsewhere before it asks which mode that is."""
        for name, most in (("num_beams", 1), ("num_beam_groups", 1), ("penalty_alpha", 0.0)):
            wanted = others.get(name, getattr(generation_config or self.generation_config, name, None))
            if wanted is not None and wanted > most:
                raise UserError(f"{name} is {wanted}: {_CANNOT}")

    def _continued(
        self, cache: Any, inputs: Tensor | None, generation_config: Any, others: dict[str, Any], cached: bool
    ) -> Tensor | None:
        """The inputs; `others` get an attention mask that says which of them are new."""
        if not isinstance(cache, SessionCache) or cache.network is not self.network:
            raise UserError("the cache is of no reader of this model; give one that its generate returned, or none")
        if not cached:
            raise UserError("a cache is given and use_cache is False; leave one of them out")
        name = "inputs" if inputs is not None else "input_ids"
        ids, mask = others.get("input_ids") if inputs is None else inputs, others.get("attention_mask")
        if ids is None or not cache.columns:
            return inputs
        B, T = ids.shape
        wanted = [others.get("num_return_sequences"), getattr(generation_config, "num_return_sequences", None)]
        count = next((n for n in (*wanted, self.generation_config.num_return_sequences) if n is not None), 1)
        if cache.batch_size == B and count > 1:
            cache.batch_repeat_interleave(count)
        if cache.batch_size != B * count:
            raise UserError(f"the cache holds {cache.batch_size} sequences, and {name} {B * count}; give as many")
        if mask is not None and mask.shape[1] > T:  # of what the cache has read too
            return inputs
        read = torch.ones_like(ids) if mask is None else mask
        if cache.columns < T and cache.has_read(ids[:, : cache.columns], read[:, : cache.columns]):
            return inputs
        before = ids.new_ones(B, cache.columns)
        others["attention_mask"] = torch.cat((before, read.to(before)), dim=1)
        return inputs

    def _validate_generation_mode(self, generation_mode: Any, *arguments: Any, **named: Any) -> None:
        if generation_mode not in _MODES:
            raise UserError(f"generation mode is {getattr(generation_mode, 'value', generation_mode)}: {_CANNOT}")
        super()._validate_generation_mode(generation_mode, *arguments, **named)

    def _get_stopping_criteria(self, *arguments: Any, **named: Any) -> Any:
        criteria = super()._get_stopping_criteria(*arguments, **named)
        marks = [one for one in criteria if isinstance(one, _Mark)]
        others = [one for one in criteria if not isinstance(one, _Mark)]
        return _Noting(others, marks[0].cache) if marks else criteria
