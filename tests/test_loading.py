"""Opening a model: by path, by the name of one in the box, and what a session of it reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import longread
from longread.checkpoint import save_model
from longread.cli import main
from longread.config import UserError
from longread.inner_loop.step import matrices
from longread.loading import OpenModel, boxed_models, find_model, open_model
from longread.tokenizer import ByteTokenizer
from tests import tiny
from tests.tokenizer_kinds import tokenizer_of

NAME = "longread-small"
SIZES = {"vocab_size": 257, "mini_batch_size": 32, "window_size": 64}
TEXT = "The house stood on a hill. Nobody had lived there for years, or so they said in the village below.\n" * 3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model of bytes called `tiny`."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = ByteTokenizer()
    save_model(home / "tiny", tiny.make(**SIZES), tiny.INNER, tokenizer.fingerprint)
    tokenizer.save(home / "tiny")
    return home


@pytest.fixture(scope="module")
def opened(home: Path) -> OpenModel:
    return open_model(home / "tiny", "cpu")


def test_a_model_in_the_box_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert NAME in boxed_models()
    assert find_model(NAME) == boxed_models()[NAME]
    assert (find_model(NAME) / "model.safetensors").is_file()
    assert open_model(NAME, "cpu").name == NAME


def test_a_path_wins_over_a_name(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).symlink_to(home / "tiny")
    assert find_model(NAME) == Path(NAME)
    assert open_model(NAME, "cpu").model.config == tiny.config(**SIZES)


@pytest.mark.parametrize("name", ["longread-large", "models/none", "", "x" * 5000, "nul\0"])
def test_an_unknown_name_is_one_sentence_that_names_those_there_are(name: str) -> None:
    with pytest.raises(UserError, match=f"no model at .*one that comes with Longread: {NAME}") as error:
        find_model(name or "none")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_a_text_is_read_as_the_command_line_reads_it(device: str, tmp_path: Path) -> None:
    """To the last digit, and to the last bit of what is remembered."""
    opened, text, whole = open_model(NAME, device), tmp_path / "text.txt", TEXT * 7
    figures, saved = tmp_path / "figures.json", tmp_path / "saved"
    text.write_text(whole, encoding="utf-8")
    arguments = ["--model", NAME, "--device", device, "--json", str(figures), "--save", str(saved)]
    assert main(["read", str(text), *arguments]) == 0
    for result in json.loads(figures.read_text(encoding="utf-8"))["results"]:
        session = opened.session(learn=result["reading"] == "learning")
        nll = session.read(whole)
        assert nll.isfinite().all()
        assert nll.double().mean().item() == pytest.approx(result["loss"]["nats_per_token"]["mean"], rel=1e-14)
        assert session.position == 1 + len(nll) > 4 * opened.model.config.mini_batch_size
        if session.learn:
            kept = opened.restore(saved)
            assert torch.equal(kept.score(TEXT), session.score(TEXT))
            pairs = zip(matrices(kept.state.fast), matrices(session.state.fast), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_only_the_first_text_begins_one(opened: OpenModel) -> None:
    whole, parts = opened.session(), opened.session()
    nll = whole.read(TEXT)
    pieces = [parts.read(TEXT[:120]), parts.read(TEXT[120:])]
    torch.testing.assert_close(torch.cat(pieces), nll)
    assert parts.recent == whole.recent


def test_only_a_text_that_begins_gets_the_mark_of_a_beginning() -> None:
    """Tokenizers like Llama 2's put one before a text, and BOS alone does not end its beginning."""
    marking = tokenizer_of("llama 2")
    model = tiny.make(**SIZES | {"vocab_size": marking.vocab_size})
    session = longread.Session(model, tiny.INNER, tokenizer=marking)
    begun, inside = marking.encode("one two"), marking.encode_inside("one two")[0]
    assert begun != inside
    session.read(marking.beginning)
    session.read("one two")
    session.read("one two")
    assert session.recent == [*marking.beginning, *begun, *inside]


def test_ids_are_read_as_they_are(opened: OpenModel) -> None:
    ids = opened.tokenizer.encode(TEXT)
    nll = opened.session().read(ids)
    assert nll[0].isnan()
    assert len(nll) == len(ids)
    begun = opened.session().read([*opened.tokenizer.beginning, *ids])
    assert torch.equal(begun[1:], opened.session().read(TEXT))
    assert not torch.equal(begun[2:], nll[1:])


def test_a_restored_session_goes_on_with_texts(opened: OpenModel, tmp_path: Path) -> None:
    session = opened.session()
    session.read(TEXT)
    session.save(tmp_path / "saved")
    restored = opened.restore(tmp_path / "saved")
    assert torch.equal(restored.read(TEXT), session.fork().read(TEXT))
    assert torch.equal(session.score(TEXT), session.read(TEXT))


def test_without_a_tokenizer_a_text_is_refused(opened: OpenModel) -> None:
    session = longread.Session(opened.model, opened.inner)
    with pytest.raises(UserError, match="has no tokenizer"):
        session.read(TEXT)
    assert session.position == 0
    assert opened.session().read("").tolist() == []


def test_what_is_printed_says_what_it_is(opened: OpenModel) -> None:
    facts = "15,520 parameters, 2,304 of them learn every 32 tokens; products in float32, on cpu"
    assert repr(opened) == f"<OpenModel tiny: {facts}>"
    shown = str(opened.model)
    assert facts in shown
    assert "(embedding): Embedding(257, 16)" in shown
    assert "2 heads, window 64" in shown
    assert "(gate): Linear(16 → 24)" in shown
    session = opened.session(learn=False)
    session.read("text")
    assert repr(session) == "<Session: 5 tokens read, 0 inner steps, drift 0.000, 0.0 MiB, frozen, on cpu>"
    assert "parameters, none of them fast weights; products" in str(tiny.make(num_suffix_blocks=0))
