"""Converted models in Transformers: what they were there before, and how they begin, end and learn."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longread.loading import open_model
from longread.transformers import LongreadForCausalLM
from tests.pretrained_models import V, a_text, convert, make, save

TEMPLATE = "{% for m in messages %}|{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader made of a tiny Llama, whose tokenizer names an end and a chat template; the source beside it."""
    home = tmp_path_factory.mktemp("converted")
    source = save(make("llama"), home / "source")
    (source / "generation_config.json").unlink()
    settings = {"eos_token": "~", "pad_token": "}", "chat_template": TEMPLATE}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert convert(source, home / "reader", "--window", "32", "--mini-batch", "8", "--suffix", "2") == 0
    return home / "reader"


def test_a_converted_model_is_what_it_was(place: Path) -> None:
    """Frozen unless it is told otherwise, and inside its window: the same logits, and it writes the same."""
    before = AutoModelForCausalLM.from_pretrained(place.parent / "source")
    found = AutoModelForCausalLM.from_pretrained(place)
    assert type(found) is LongreadForCausalLM
    ids = a_text(20)
    torch.testing.assert_close(found(ids).logits, before(ids).logits, rtol=0, atol=1e-4)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": V - 1}
    mask = torch.ones_like(ids)
    expected = before.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(found.generate(ids, attention_mask=mask, **settings), expected)
    learning = AutoModelForCausalLM.from_pretrained(place, learn=True)
    session = open_model(place, "cpu").session(learn=True)
    session.read(ids[0])
    written = learning.generate(ids, attention_mask=mask, **settings)
    assert written[0, 20:].tolist() == list(session.generate(10, temperature=0))
    assert (learning(ids).logits - found(ids).logits).abs().max() > 1e-4


def test_it_begins_and_ends_as_its_tokenizer_says(place: Path) -> None:
    found, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    native = open_model(place, "cpu").tokenizer
    assert tokenizer("Hello you")["input_ids"] == native.beginning + native.encode("Hello you")
    assert found.generation_config.eos_token_id == tokenizer.eos_token_id == native.encode("~")[0]
    assert found.generation_config.pad_token_id == tokenizer.pad_token_id == native.encode("}")[0]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=True)
    assert tokenizer.decode(chat["input_ids"]).replace(" ", "") == "|Hi"


def test_that_it_reads_frozen_is_said(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        LongreadForCausalLM.from_pretrained(place)
        assert "reads frozen, as its config.json says" in caplog.text
        caplog.clear()
        AutoModelForCausalLM.from_pretrained(place, learn=True)
        LongreadForCausalLM.from_pretrained("longread-small", learn=False)
        assert "frozen" not in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
