"""Trees as the official code saves them, written by Orbax itself, and what `longread convert` makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import torch
from torch import Tensor

from longread.checkpoint import from_official, load_model, to_official
from longread.cli import main
from longread.config import InnerConfig
from longread.recipes import Size
from tests import tiny

LAYOUTS = {
    "ocdbt": (True, False),
    "ocdbt, zarr 3": (True, True),
    "files": (False, False),
    "files, zarr 3": (False, True),
}
DIALS = ("--size", "tiny", "--window", "6", "--mini-batch", "4")
Official = dict[str, Tensor]


def size(**changes: int) -> Size:
    """A row of Table 3 for the tiny network."""
    fields = {"num_blocks": 4, "width": 16, "num_heads": 2, "mlp_hidden": 24}
    run = {"batch_tokens": 8192, "lr": 1e-3, "steps": 10, "extension_batch_tokens": 8192, "extension_steps": 1}
    return Size(**fields | run | changes)  # type: ignore[arg-type]


@jax.tree_util.register_pytree_with_keys_class
class Module:
    """A node whose children are attributes, as in Equinox, which the official code is written with."""

    def __init__(self, **children: Any) -> None:
        self.children = children

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        named = [(jax.tree_util.GetAttrKey(name), child) for name, child in self.children.items()]
        return named, tuple(self.children)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: Any) -> Module:
        return cls(**dict(zip(names, children, strict=True)))


def weight(tensor: Tensor) -> Module:
    kind = str(tensor.dtype).removeprefix("torch.")
    numbers = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return Module(weight=jax.numpy.asarray(numbers.numpy(), dtype=kind), bias=None)


def tree(of: Mapping[str, Tensor]) -> Module:
    """The weights of the official `MetaModel`, in which whatever is no floating-point array is None."""

    def each(prefix: str, *names: str) -> dict[str, Module]:
        return {name: weight(of[f"{prefix}.{name}"]) for name in names}

    blocks = Module(
        seq_modeling_block=Module(**each("blocks", "wq", "wk", "wv", "wo", "q_norm", "k_norm"), kv_cache_index=None),
        feed_forward=Module(**each("blocks", "w1", "w2", "w3")),
        **each("blocks", "seq_norm", "ffn_norm", "seq_post_norm", "ffn_post_norm"),
        feed_forward_prime=None,
    )
    prime = None
    if "prime.w1" in of:
        fast = Module(**each("prime", "w1", "w2", "w3"))
        prime = Module(**each("prime", "ffn_prime_norm", "ffn_prime_post_norm"), feed_forward_prime=fast)
    head = weight(of["lm_head.weight"]) if "lm_head.weight" in of else None
    h = Module(blocks=blocks, prime_storage=prime)
    network = Module(wte=weight(of["embed.weight"]), ln_f=weight(of["final_norm.weight"]), h=h)
    return Module(step_index=None, language_model=Module(model=network, lm_head=head))


def save(directory: Path, weights: Any, layout: str = "ocdbt", **more: Any) -> Path:
    """One item."""
    use_ocdbt, use_zarr3 = LAYOUTS[layout]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(weights, **more))
    return directory


def drawn(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Official:
    """The tensors of a tiny model."""
    model = tiny.make(seed, dtype, **{"init_std": 0.02} | changes)
    return to_official(model.state_dict(), model.config)


def save_run(directory: Path) -> Path:
    """A run of the official code, of which step 10 has `drawn(0)`."""
    with ocp.CheckpointManager(directory) as manager:
        for step, seed in ((9, 1), (10, 0)):
            item = ocp.args.StandardSave(tree(drawn(seed)))
            manager.save(step, args=ocp.args.Composite(model_weights=item, opt_state=item), force=True)
    return directory


def items_in(directory: Path) -> Callable[[str], Path]:
    """Gives an item of `drawn(0)` in a named layout, written when it is first asked for."""
    made: dict[str, Path] = {}

    def saved(layout: str) -> Path:
        if layout not in made:
            made[layout] = save(directory / layout, tree(drawn()), layout)
        return made[layout]

    return saved


def convert(source: Path, destination: Path, *more: str) -> int:
    return main(["convert", str(source), str(destination), *DIALS, *more])


def check(directory: Path, official: Official, **changes: object) -> None:
    """The model in a directory is the official one, to the bit."""
    loaded = load_model(directory)
    config = tiny.config(**{"init_std": 0.02} | changes)
    assert (loaded.model.config, loaded.inner) == (config, InnerConfig())
    state, wanted = loaded.model.state_dict(), from_official(official, config)
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
