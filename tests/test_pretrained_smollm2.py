"""SmolLM2-135M itself, from a GGUF file: `LONGREAD_SMOLLM2` names it, or a directory that Transformers reads."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.pretrained_models import check_equal, converted, logits_of, losses_of

ROOT = Path(__file__).parent.parent
TOKENS = 192


@pytest.mark.slow
def test_smollm2_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    named = os.environ.get("LONGREAD_SMOLLM2")
    if not named or not Path(named).exists():
        pytest.skip("LONGREAD_SMOLLM2 names no GGUF file or directory of SmolLM2-135M")
    source = Path(named)
    directory, options = (source, {}) if source.is_dir() else (source.parent, {"gguf_file": source.name})
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    opened = converted(source, tmp_path / "reader")
    text = (ROOT / "LICENSE").read_text()
    tokenizer = opened.tokenizer
    assert tokenizer.beginning == []
    # From a GGUF, Transformers forgets that every digit is a word, and splits the spaces before it otherwise.
    words = text if source.is_dir() else re.sub(r"\d", "", text)
    assert tokenizer.encode(words) == their_tokenizer.encode(words)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("   2026")] == ["   ", "2", "0", "2", "6"]
    ids = torch.tensor([tokenizer.encode(text)[:TOKENS]])
    with torch.no_grad():
        want = theirs(ids).logits
    check_equal(logits_of(opened, ids), want)
    check_equal(logits_of(opened, ids, learning=True), want)
    nll = torch.nn.functional.cross_entropy(want[0, :-1], ids[0, 1:], reduction="none")
    assert (losses_of(opened, ids, learn=False) - nll).abs().max() < 1e-3
    prompt = "The capital of France is"
    written = "".join(opened.session().write(prompt, max_tokens=8, temperature=0))
    out = theirs.generate(torch.tensor([tokenizer.encode(prompt)]), max_new_tokens=8, do_sample=False)[0]
    assert their_tokenizer.decode(out) == prompt + written
