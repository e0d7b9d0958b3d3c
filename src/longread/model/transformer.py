"""The Transformer of the paper, in two halves that the inner loop cuts apart.

The inner gradient crosses only what lies above the lowest fast MLP. `lower` is everything below it: embedding,
prefix blocks, and the attention of the first suffix block, which sees no fast weight. It runs over any stretch
of tokens at once. `upper` is the rest: it runs mini-batch by mini-batch with the weights of the moment.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.distributed import ProcessGroup
from torch.profiler import record_function
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longread.config import BlockRope, ModelConfig
from longread.model.layers import MLP, JoinedSwiGLU, Linear, NoNorm, Norm, RMSNorm, SwiGLU, stacked
from longread.model.mixers.attention import Attention, Past
from longread.model.mixers.recurrent import RecurrentMixer
from longread.model.mixers.registry import RECURRENT
from longread.ops.attention import KEPT_OPERATIONS
from longread.ops.cross_entropy import capped, cross_entropy
from longread.ops.gemv import gemv
from longread.ops.linear import SharedWeight
from longread.ops.rms_norm import shared_gain
from longread.ops.rotary import Scaling, frequencies, rotation

FastWeights = tuple[SwiGLU | JoinedSwiGLU, ...]
"""The fast weights of one batch of sequences: the matrices of each suffix block, lowest first."""

MixerPast = Any
"""Of one mixer: attention's `Past`, or the state of a recurrent one, another NamedTuple of tensors [B, ...]."""

Rotary = dict[BlockRope, Tensor | None]
"""The rotary embedding of some positions, for each kind that blocks have."""

Frequencies = dict[BlockRope, Tensor | None]
"""Radians a token of each pair of a head, float64 [H/2], for each kind that blocks have."""

EMBEDDING_STD = 0.02
RECOMPUTE = "recompute"
"""The range in a profile of what runs again for its gradient."""


class Block(nn.Module):
    """One or two mixers, then in the suffix the fast MLP, then the static MLP, each a residual sub-layer of its own.

    Each mixer has the name of its kind (`ModelConfig.mixers_of`); `mixers` are all of them in their order.
    """

    attention: Attention

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()

        def norm(wanted: bool) -> Norm:
            return RMSNorm(config.width, config.norm_eps) if wanted else NoNorm()

        def mlp(hidden: int, pre_norm: bool, post_norm: bool) -> MLP:
            return MLP(config.width, hidden, norm(pre_norm), norm(post_norm), config.gate)

        self.rope = config.rope_of(index)
        self.learns = index >= config.num_prefix_blocks
        """Whether it has a fast MLP."""
        self._kinds = config.mixers_of(index)
        for kind in self._kinds:
            norms = norm(config.pre_norm), norm(config.post_norm)
            if kind == "attention":
                self.attention = Attention(config, config.window_of(index), *norms)
            else:
                setattr(self, kind, RECURRENT[kind](config, *norms))
        if self.learns:
            self.fast_mlp = mlp(config.fast_mlp_hidden, *config.fast_norms)
        self.static_mlp = mlp(config.mlp_hidden, config.pre_norm, config.post_norm)

    @property
    def mixers(self) -> list[Attention | RecurrentMixer]:
        """The sub-layers through which tokens exchange information, in their order."""
        return [getattr(self, kind) for kind in self._kinds]

    def below(self, x: Tensor, pasts: Sequence[MixerPast], rotary: Rotary) -> tuple[Tensor, list[MixerPast]]:
        """Its part of `Transformer.lower`: the mixers, and in the prefix the MLP; also what each mixer made."""
        own = []
        for mixer, past in zip(self.mixers, pasts, strict=True):
            x, made = mixer(x, past, rotary=rotary[self.rope], order=1)
            own.append(made)
        return (x if self.learns else self.static_mlp(x)), own

    def above(
        self,
        x: Tensor,
        past: Past | None,
        fast: SwiGLU | JoinedSwiGLU | None,
        rotary: Rotary,
        order: int,
        group: ProcessGroup | None = None,
    ) -> tuple[Tensor, Past | None]:
        """Its part of `Transformer.upper`: attention, unless it belongs to `below` (no past), and both MLPs."""
        own = None
        if past is not None:
            x, own = self.attention(x, past, rotary=rotary[self.rope], order=order)
        return self.static_mlp(self.fast_mlp(x, fast, group)), own


class Transformer(nn.Module):
    """A causal language model whose suffix MLPs can be given per sequence. Parameters are float32 masters.

    Products run in `compute_dtype`: the parameters' own type by default, bfloat16 on a GPU.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.state_group: ProcessGroup | None = None
        """Ranks that read the same sequences in the end-to-end loss, and divide the fast MLPs' hidden units there."""
        self.known_tokens: int | None = None
        """Ids from here on are padding of the vocabulary, and never likely; None: all are tokens."""
        self._shared_head: Tensor | None = None
        self._ropes = {config.rope_of(index) for index in range(config.num_blocks)}
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_blocks))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab_size)
        initialize(self)

    def extra_repr(self) -> str:
        config = self.config
        learning = "none of them fast weights"
        if config.num_suffix_blocks:
            learning = f"{config.num_fast_weights:,} of them learn every {config.mini_batch_size:,} tokens"
        where = f"products in {str(self.dtype).removeprefix('torch.')}, on {self.device}"
        return f"{config.num_parameters:,} parameters, {learning}; {where}"

    @property
    def prefix(self) -> list[Block]:
        """The blocks without a fast MLP."""
        return cast("list[Block]", list(self.blocks)[: self.config.num_prefix_blocks])

    @property
    def suffix(self) -> list[Block]:
        """The blocks with a fast MLP; the first one's attention belongs to `lower` all the same."""
        return cast("list[Block]", list(self.blocks)[self.config.num_prefix_blocks :])

    @property
    def num_lower_attentions(self) -> int:
        """Mixers that see no fast weight: those of the prefix and of the first suffix block."""
        return sum(len(block.mixers) for block in (*self.prefix, *self.suffix[:1]))

    @property
    def head_weight(self) -> Tensor:
        """[V, D]"""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def dtype(self) -> torch.dtype:
        """The type that products run in and that hidden states have."""
        return self.compute_dtype or self.embedding.weight.dtype

    @property
    def casts(self) -> bool:
        """Whether products run in another type than the parameters have."""
        return self.dtype != self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def upper_parameters(self) -> list[nn.Parameter]:
        """The parameters that `upper` and `token_losses` use, but for W_0, which comes in as fast weights."""
        modules = [self.head or self.embedding, *self._upper_modules()]
        return [parameter for module in modules for parameter in module.parameters()]

    def _upper_modules(self) -> list[nn.Module]:
        """The modules of `upper` with slow weights alone."""
        modules: list[nn.Module] = [self.final_norm]
        for index, block in enumerate(self.suffix):
            modules += [] if index == 0 else [block.attention]
            modules += [block.fast_mlp.pre_norm, block.fast_mlp.post_norm, block.static_mlp]
        return modules

    @contextlib.contextmanager
    def sharing_weights(self) -> Iterator[None]:
        """While many mini-batches pass through `upper` and `token_losses`: each slow matrix is cast only once, and the
        gradients of a matrix or gain are summed only once.

        Layers that multiply the same vectors are cast into one, which would be a copy where there is no cast.
        """
        modules: list[MLP | Attention] = [block.static_mlp for block in self.suffix]
        modules += [block.attention for block in self.suffix[1:]]
        stacks = [stack for module in modules for stack in module.stacks]
        if not self.casts:
            stacks = [(layer,) for stack in stacks for layer in stack]
        for stack in stacks:
            weights, biases = stacked(stack)
            stack[0].shared = SharedWeight(weights, self.dtype, biases)
        norms = [norm for upper in self._upper_modules() for norm in upper.modules() if isinstance(norm, RMSNorm)]
        for norm in norms:
            norm.shared = shared_gain(norm.weight)
        object.__setattr__(self, "_shared_head", self.head_weight.to(self.dtype))  # never a parameter of its own
        try:
            yield
        finally:
            self._shared_head = None
            for first, *_ in stacks:
                first.shared = None
            for norm in norms:
                norm.shared = None

    def initial_fast_weights(self, batch_size: int, group: ProcessGroup | None = None) -> FastWeights:
        """W_0 for every sequence of a batch, as views of the parameters; with a `group` this rank's part of it."""
        return tuple(block.fast_mlp.initial_weights(batch_size, group) for block in self.suffix)

    def joined_initial_fast_weights(self, batch_size: int, group: ProcessGroup | None = None) -> FastWeights:
        """The same with gate and up as one matrix each."""
        return tuple(block.fast_mlp.joined_initial_weights(batch_size, group) for block in self.suffix)

    def empty_pasts(self, batch_size: int) -> tuple[tuple[MixerPast, ...], tuple[MixerPast, ...]]:
        """The pasts of sequences that begin: those of `lower`'s mixers, and those of `upper`'s."""
        like = torch.empty(batch_size, 0, device=self.device, dtype=self.dtype)
        pasts = tuple(mixer.empty_past(like) for block in (*self.prefix, *self.suffix) for mixer in block.mixers)
        return pasts[: self.num_lower_attentions], pasts[self.num_lower_attentions :]

    def embed(self, input_ids: Tensor) -> Tensor:
        """[..., D], the input of the lowest block, from int64 [...]."""
        x = self.embedding(input_ids).to(self.dtype)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale

    def lower(
        self,
        input_ids: Tensor,
        pasts: Sequence[MixerPast],
        *,
        start: int | Tensor,
        recompute: int = 0,
        keep_attention: bool = True,
        pause: Callable[[], None] | None = None,
    ) -> tuple[Tensor, tuple[MixerPast, ...]]:
        """Everything that no fast weight touches, over tokens at positions start … start + T − 1.

        Args:
            input_ids: int64 [B, T].
            pasts: one for each of the `num_lower_attentions` mixers.
            start: a tensor [] where it changes under a CUDA graph; [B] where each sequence is somewhere else.
            recompute: so many of the model's blocks, the lowest, keep for the gradient only input and attention's
                results; the rest of them runs again.
            keep_attention: without it, attention runs again too.
            pause: called before each block; nothing is half done there, so the caller may do something else.

        Returns:
            hidden [B, T, D], the input of the lowest fast MLP (or of the final norm), and of each mixer what `advance`
            needs: attention's own keys and values, a recurrence's state. Nothing of blocks that run again: it would be
            kept too.
        """
        x = self.embed(input_ids)
        rotary, left = self.rotary(start, x), iter(pasts)
        own: list[MixerPast] = []
        for index, block in enumerate((*self.prefix, *self.suffix[:1])):
            if pause is not None:
                pause()
            inputs, again = (x, [next(left) for _ in block.mixers], rotary), index < recompute
            x, made = _perhaps_again(block.below, *inputs, again=again, keep_attention=keep_attention)
            own += [] if again else made
        return x, tuple(own)

    def upper(
        self,
        hidden: Tensor,
        fast: FastWeights | None,
        pasts: Sequence[MixerPast],
        *,
        start: int | Tensor,
        order: int,
        recompute: int = 0,
        group: ProcessGroup | None = None,
        pause: Callable[[], None] | None = None,
    ) -> tuple[Tensor, tuple[Past, ...]]:
        """The suffix above its first attention, and the final norm, with the given fast weights.

        Args:
            hidden: [B, T, D] from `lower`.
            fast: one `SwiGLU` for each suffix block; None: the parameters W_0 as they are, shared by all sequences.
            pasts: one for each attention above the lowest fast MLP.
            order: order of derivative that will be taken.
            recompute, pause: as in `lower`.
            group: ranks that divide F among themselves and have all else alike; `fast` is then this rank's part.

        Returns:
            [B, T, D], what the head turns into logits, and each attention's own keys and values, for `advance`.
        """
        x, rotary, own = hidden, self.rotary(start, hidden), []
        for index, block in enumerate(self.suffix):
            if pause is not None:
                pause()
            past = pasts[index - 1] if index else None
            weights, again = None if fast is None else fast[index], len(self.prefix) + index < recompute
            x, made = _perhaps_again(block.above, x, past, weights, rotary, order, group, again=again)
            own += [] if made is None or again else [made]
        return self.final_norm(x), tuple(own)

    def rotary(self, start: int | Tensor, x: Tensor, frequencies: Frequencies | None = None) -> Rotary:
        """That of tokens x [B, T, D] at positions start … start + T − 1; `frequencies()` may be given."""
        known = self.frequencies() if frequencies is None else frequencies
        return {kind: None if f is None else rotation(start, x.shape[1], f, x) for kind, f in known.items()}

    def frequencies(self) -> Frequencies:
        """By which the rotary embedding turns."""
        return {kind: self._frequencies_of(kind) for kind in self._ropes}

    def _frequencies_of(self, kind: BlockRope) -> Tensor | None:
        config = self.config
        if kind == "none":
            return None
        base, scaling = config.rope_base, config.rope_scaling
        if kind == "local" and config.local_rope_base is not None:
            base, scaling = config.local_rope_base, None
        stretched = None if scaling is None else Scaling(**scaling.as_dict())
        return frequencies(config.head_dim, base, stretched, device=self.device)

    def token_losses(self, output: Tensor, target_ids: Tensor) -> Tensor:
        """−log p of each target [B, T], given `upper`'s output [B, T, D]; float32 or wider."""
        head = self.head_weight if self._shared_head is None else self._shared_head
        return cross_entropy(output, head, target_ids, soft_cap=self.config.logit_soft_cap)

    def logits(self, output: Tensor) -> Tensor:
        """[..., V], float32 or wider, from `upper`'s output [..., D]."""
        wide = torch.promote_types(output.dtype, torch.float32)
        if output.dim() == 2 and not torch.is_grad_enabled():
            logits = gemv(output, self.head_weight, dtype=wide)
        else:
            logits = (output @ self.head_weight.to(output.dtype).t()).to(wide)
        cap = self.config.logit_soft_cap
        logits = logits if cap is None else capped(logits, cap)
        if self.known_tokens is not None:
            logits[..., self.known_tokens :] = -math.inf
        return logits

    def advance(
        self, pasts: Sequence[MixerPast], own: Sequence[MixerPast], first: int, extra: int = 0
    ) -> tuple[MixerPast, ...]:
        """The pasts of later tokens, made of the pasts and of the tokens after them.

        Of windowed attention these are K tokens (and `extra`), of full attention all; of a recurrence, its state.

        Args:
            pasts, own: one for each of as many mixers.
            first: index of the lowest of them among all mixers.
        """
        mixers = [mixer for block in (*self.prefix, *self.suffix) for mixer in block.mixers]
        return tuple(
            past.followed_by(made, None if mixer.window is None else mixer.window + extra)
            if isinstance(mixer, Attention)
            else made
            for past, made, mixer in zip(pasts, own, mixers[first : first + len(own)], strict=True)
        )


def _perhaps_again(function: Callable[..., Any], *args: Any, again: bool, keep_attention: bool = True) -> Any:
    """`function(*args)`; with `again` its gradient keeps arguments and attention's results, and runs the rest again."""
    if not again:
        return function(*args)
    context = _keeping if keep_attention else _keeping_nothing
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context)


def _keeping() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts that are entered for the first run, and for the second."""
    first, second = create_selective_checkpoint_contexts(_policy)
    return first, _Recomputing(second)


def _keeping_nothing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The same where attention runs again too."""
    return contextlib.nullcontext(), _Recomputing(contextlib.nullcontext())


class _Recomputing:
    """A context within its range of a profile. It may be entered again: who does is told why not to."""

    def __init__(self, context: AbstractContextManager[Any]) -> None:
        self._context, self._range = context, record_function(RECOMPUTE)

    def __enter__(self) -> None:
        self._range.__enter__()
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        self._range.__exit__(*error)


def _policy(_: Any, operation: OpOverload, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in KEPT_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE


@torch.no_grad()
def initialize(model: Transformer, seed: int | None = None) -> None:
    """Draws all weights anew; with a seed, always the same ones.

    Matrices are normal with standard deviation fan_in^-1/2, which the paper's 0.02 is near width 2500; at the
    widths of a laptop 0.02 makes the outer gradient explode. The embedding is drawn at 0.02, gains are 1, biases 0.
    """
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    std = model.config.init_std
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
        else:
            default = EMBEDDING_STD if name == "embedding.weight" else parameter.shape[1] ** -0.5
            parameter.normal_(std=std or default, generator=generator)
    for module in model.modules():
        if isinstance(module, RecurrentMixer):
            module.initialize(generator)
