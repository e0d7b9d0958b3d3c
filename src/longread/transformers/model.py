"""A reader as a model of Transformers: its forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from longread.config import UserError
from longread.model import Transformer
from longread.transformers.cache import SessionCache
from longread.transformers.config import LongreadConfig
from longread.transformers.directory import ModelDirectory
from longread.transformers.generating import Generating
from longread.transformers.reading import mask_of, read_columns, read_next
from longread.transformers.training import IGNORED, align, columns_of, outer_loss
from longread.transformers.versions import CACHE


class LongreadForCausalLM(Generating, ModelDirectory, PreTrainedModel, GenerationMixin):
    """A language model that learns while it reads. Its parameters have the names that they have in Longread's files.

    In evaluation it reads: every row of what it is given is a session, which learns from its own tokens, and the
    logits at a token are those before the step that the token takes part in. In training it gives the loss of the
    model as it learns, whose gradient goes through the inner steps.
    """

    config_class = LongreadConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean of means, not a sum over tokens
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012  # as the base class has it

    def __init__(self, config: LongreadConfig) -> None:
        super().__init__(config)
        network = Transformer(config.network)
        object.__setattr__(self, "network", network)  # no module of this one, whose modules are the network's
        self.embedding, self.blocks, self.final_norm = network.embedding, network.blocks, network.final_norm
        self.head = network.head
        self.fingerprint: str | None = None
        """Of the weights, where it is known: as long as they are those of a file."""
        self.inner_rate: float | None = None
        """Rate of the inner steps in training; None: as the configuration says."""
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are drawn where the network is made."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding; tied, it is the head too."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: raises `UserError`."""
        raise UserError("the vocabulary of a reader is fixed by its configuration; convert a model that has the tokens")

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where it is the embedding."""
        return self.head

    def gradient_checkpointing_enable(self, *arguments: Any, **named: Any) -> None:
        """Changes nothing: what the gradient needs is computed again as memory demands, with this or without."""

    def gradient_checkpointing_disable(self) -> None:
        """Changes nothing."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: SessionCache | None = None,
        past_key_values: SessionCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        learn: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Reads tokens, or in training gives the loss of the model as it learns.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], or of what the cache has read too; 0 where there is padding, on whichever side: it
                is not read.
            labels: int64 [B, T], not shifted, -100 where a token is no target. Learning while reading is from all
                tokens, whatever their labels.
            cache, past_key_values: where to go on; a `SessionCache`, which is used up.
            use_cache: whether to return the cache; None: as the configuration says. Never in training.
            logits_to_keep: the last so many columns, 0 for all, or the indices of columns.
            learn: False reads with the weights as they are, and has the static loss; None: as the cache or the
                configuration says.

        Returns:
            `loss` [], if there are labels: in training `longread.end_to_end_loss`, a mean over mini-batches; else the
            mean over all targets. `logits` [B, T, V], float32 or wider: at padding those after the tokens before it, 0
            before the first. In training with labels they are constants, and left out if the configuration says
            `training_logits=False`. And the cache.

        Raises:
            UserError: what is given does not fit together, or is nothing that a reader can read.
        """
        given = past_key_values if cache is None else cache
        ids = self._readable(input_ids, given, others)
        if given is not None and given.rows:
            self.network.compute_dtype = given.compute_dtype
        else:
            self.settle_compute_dtype()
        if self.training and torch.is_grad_enabled() and given is None:
            with _plain(ids):
                loss, logits = self._trained(ids, attention_mask, labels, logits_to_keep, learn)
            found: dict[str, Any] = {"loss": loss, "logits": logits}
        else:
            with torch.inference_mode(False), torch.no_grad(), _plain(ids):
                given = SessionCache(self, learn=learn) if given is None else given
                loss, logits = self._read(given, ids.clone(), attention_mask, labels, logits_to_keep, learn)
            wanted = self.config.use_cache if use_cache is None else use_cache
            found = {"loss": loss, "logits": logits, **({CACHE: given} if wanted else {})}
        output = CausalLMOutputWithPast(**found)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict is not False else output.to_tuple()

    def _readable(self, input_ids: Tensor | None, cache: Any, others: Mapping[str, Any]) -> Tensor:
        unknown = [name for name, value in others.items() if value is not None and value is not False]
        if unknown:
            raise UserError(
                f"a reader has no use for {unknown[0]}; give input_ids, attention_mask, labels and cache, a text a row"
            )
        if input_ids is None or input_ids.dim() != 2 or not input_ids.shape[1]:
            shape = None if input_ids is None else list(input_ids.shape)
            raise UserError(f"input_ids have shape {shape}; give token ids [B, T], at least one for each row")
        if cache is not None and (not isinstance(cache, SessionCache) or cache.network is not self.network):
            raise UserError("the cache is of no reader of this model; give a longread.transformers.SessionCache of it")
        if getattr(self, "_is_replica", False):
            raise UserError(
                "torch.nn.DataParallel cannot copy a reader to several GPUs; show it one by CUDA_VISIBLE_DEVICES, or "
                "start a process for each with torchrun"
            )
        return input_ids.to(self.network.device)

    def settle_compute_dtype(self) -> None:
        """Makes products run in the type of autocast where parameters are float32, and in float32 where they are half
        on a CPU, which emulates products in half precision; else in that of the parameters."""
        kind, parameters = self.network.device.type, self.network.embedding.weight.dtype
        wanted = torch.float32 if kind == "cpu" and parameters.itemsize < 4 else None
        if kind != "meta" and parameters == torch.float32 and torch.is_autocast_enabled(kind):
            wanted = torch.get_autocast_dtype(kind)
        self.network.compute_dtype = wanted

    def _trained(
        self, ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, keep: int | Tensor, learn: bool | None
    ) -> tuple[Tensor | None, Tensor | None]:
        self.fingerprint = None  # whoever asks for a gradient is about to change the weights
        inner, mask = self.config.inner_config, mask_of(attention_mask, ids)
        wanted = labels is None or self.config.training_logits
        aligned = align(
            ids,
            mask,
            None if labels is None else labels.to(ids.device),
            self.network.config.mini_batch_size,
            whole=wanted,
        )
        found = outer_loss(
            self.network,
            inner,
            aligned,
            learn=self.config.learn if learn is None else learn,
            rate=inner.lr if self.inner_rate is None else self.inner_rate,
            recompute="blocks" if labels is None else "auto",
            outputs=wanted,
        )
        if found.output is None:
            return found.loss, None
        output = _kept(columns_of(found.output, mask, ids.shape[1]), keep)
        if labels is None:
            return None, self.network.logits(output)
        with torch.no_grad():
            return found.loss, self.network.logits(output)

    def _read(
        self,
        cache: SessionCache,
        ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        keep: int | Tensor,
        learn: bool | None,
    ) -> tuple[Tensor | None, Tensor]:
        (B, T), mask = ids.shape, mask_of(attention_mask, ids)
        if not cache.rows:
            cache.begin(B)
            cache.compute_dtype = self.network.compute_dtype
        cache.begin(B)
        if learn is not None and learn != cache.learn:
            cache.settled()
            cache.learn = learn
        if cache.ended is not None and B > 1:
            going = cache.ended.logical_not().cpu()[:, None].expand(B, T)
            mask = going if mask is None else mask & going
        began = torch.tensor([cache.position(row) > 0 for row in range(B)])
        logits = read_next(cache, ids[:, 0], None if mask is None else mask[:, 0]) if T == 1 else None
        cache.columns += T
        if logits is not None:
            return (None if labels is None else logits.sum() * torch.nan), logits.unsqueeze(1)
        few = isinstance(keep, int) and keep == 1 and labels is None
        output = read_columns(cache, ids, mask, all_outputs=T > 1 and not few)
        loss = None if labels is None else self._loss(output, labels.to(ids.device), mask, began)
        return loss, self.network.logits(output if few else _kept(output, keep))

    def _loss(self, output: Tensor, labels: Tensor, mask: Tensor | None, began: Tensor) -> Tensor:
        """The mean over all targets that something predicts."""
        counts = labels[:, 1:] != IGNORED
        if mask is not None:
            known = (mask.cumsum(1)[:, :-1] > 0) | began[:, None]
            counts &= (known & mask[:, 1:]).to(counts.device)
        nll = self.network.token_losses(output[:, : labels.shape[1] - 1], labels[:, 1:].clamp(min=0))
        return nll[counts].mean()


def _kept(x: Tensor, keep: int | Tensor) -> Tensor:
    """The columns of x [B, T, D] that are wanted."""
    return x[:, -keep:] if isinstance(keep, int) and keep else x if isinstance(keep, int) else x[:, keep]


@contextlib.contextmanager
def _plain(ids: Tensor) -> Iterator[None]:
    """Without autocast: the network knows by itself which products run in which type."""
    if ids.device.type == "meta":
        yield
        return
    with torch.autocast(ids.device.type, enabled=False):
        yield
