"""The config of the official layout, field by field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longread import checkpoint
from longread.config import InnerConfig, UserError
from tests.test_checkpoint import equal, make_model

OTHERS = {
    "rope_base": 77.0,
    "norm_eps": 1e-3,
    "tie_embeddings": False,
    "pre_norm": False,
    "post_norm": False,
    "qk_norm": False,
}
"""Every field that the layout can hold and that has a default, with another value."""


@pytest.mark.parametrize("field", OTHERS)
@pytest.mark.parametrize("learning", [0, 1])
def test_no_field_is_lost(tmp_path: Path, field: str, learning: int) -> None:
    model = make_model(num_suffix_blocks=learning, **{field: OTHERS[field]})
    inner = InnerConfig(lr=0.25, clip=None if learning else 3.5, warmup_from=0.125, warmup_steps=7)
    checkpoint.export_official(tmp_path, model, inner)
    back, found = checkpoint.import_official(tmp_path)
    assert back.config == model.config
    assert equal(back, model)
    assert found == inner


def test_gains_that_are_switched_off_are_left_out() -> None:
    def names(**changes: object) -> set[str]:
        model = make_model(**changes)
        return {name.rpartition(".")[2] for name in checkpoint.to_official(model.state_dict(), model.config)}

    assert names() - names(qk_norm=False) == {"q_norm", "k_norm"}
    assert names() - names(pre_norm=False) == {"seq_norm", "ffn_norm", "ffn_prime_norm"}
    assert names() - names(post_norm=False) == {"seq_post_norm", "ffn_post_norm", "ffn_prime_post_norm"}


def test_the_config_as_others_read_it(tmp_path: Path) -> None:
    checkpoint.export_official(tmp_path, make_model(), InnerConfig(lr=0.25, clip=None, warmup_steps=7))
    text = (tmp_path / "config.json").read_text()
    assert text.startswith('{\n  "model": {\n    "vocab_size": 11,\n')  # for people too
    fields = json.loads(text)
    assert fields["model"] == {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 6,
        "mini_batch_size": 4,
        "sliding_window_size": 4,
        "suffix_len": 1,
        "prime": True,
        "rope_theta": make_model().config.rope_base,
        "rms_norm_eps": make_model().config.norm_eps,
        "qk_norm": True,
        "pre_norm": True,
        "post_norm": True,
        "tie_word_embeddings": True,
        "output_size": 11,
        "seq_modeling_block": "SWA",
    }
    assert fields["training"]["train_mode"] == "meta"
    assert fields["training"]["optimizer_inner"] == {"optimizer_type": "sgd", "lr": 0.25, "clip_gradient": 0.0}


def test_a_model_that_does_not_learn_is_named_so(tmp_path: Path) -> None:
    model = make_model(num_suffix_blocks=0, attention="full")
    checkpoint.export_official(tmp_path, model, InnerConfig(lr=0.25, clip=2.5))
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["model"]["prime"], fields["model"]["suffix_len"]) == (False, 0)
    assert fields["model"]["seq_modeling_block"] == "self_attention"
    assert fields["training"]["train_mode"] == "pretrain"
    assert fields["training"]["optimizer_inner"]["clip_gradient"] == 2.5


def test_an_inner_loss_with_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"inner\.surprise 0\.5 has no name in the official layout; export"):
        checkpoint.export_official(tmp_path, make_model(), InnerConfig(surprise=0.5))
    assert not list(tmp_path.iterdir())
