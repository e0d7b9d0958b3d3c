"""Kept tokens in sessions and files, in batches, and where there are none."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longread.checkpoint import export_official, save_model
from longread.cli import main as command
from longread.config import ModelConfig, OptimizerConfig, RunConfig, UserError
from longread.engine import Engine, Limits, Sampling as EngineSampling, largest_session
from longread.files import read_tensors, write_tensors_atomically
from longread.flops import decoding_bytes, reading_flops
from longread.inner_loop import begin, read
from longread.inner_loop.state import apart, shapes_of, together
from longread.loading import OpenModel, open_model
from longread.model import Transformer
from longread.ops.attention import Further, attention
from longread.ops.attention.reference import reference_attention
from longread.outer_loop import end_to_end_loss, static_loss
from longread.pretrained.back_config import plain_of
from longread.session import Session
from longread.speculative import Speculation
from longread.tokenizer import ByteTokenizer
from tests import tiny
from tests.small_model import TEXT, save_small_model
from tests.tiny import INNER, M, make, text

W, KEPT, RUN = 8, 5, 3


def keeping(dtype: torch.dtype = torch.float64, **changes: object) -> Transformer:
    return make(3, dtype, **({"window_size": W, "kept_tokens": KEPT, "kept_run": RUN} | changes))


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("before", [3, M, 21, 6 * M, 6 * M + 1])
def test_a_saved_session_goes_on_as_if_it_had_not_been_saved(tmp_path: Path, learn: bool, before: int) -> None:
    model = keeping()
    session = Session(model, INNER, learn=learn)
    session.read(text(before))
    session.save(tmp_path / "a.session")
    restored = Session.restore(tmp_path / "a.session", model)
    assert restored.nbytes == session.nbytes
    assert torch.equal(restored.read(text(30, 1)), session.read(text(30, 1)))
    assert list(restored.generate(9, temperature=0)) == list(session.generate(9, temperature=0))


def test_it_is_a_session_of_no_model_that_keeps_others(tmp_path: Path) -> None:
    session = Session(keeping(), INNER)
    session.read(text(30))
    session.save(tmp_path / "a.session")
    for other in (make(3, torch.float64, window_size=W), keeping(kept_tokens=4)):
        with pytest.raises(UserError, match="belongs to another model"):
            Session.restore(tmp_path / "a.session", other)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kept.position", lambda x: x + 40, "keeps tokens that are none of its 30"),
        ("kept.position", lambda x: x[:, 1:], "kept.position is I64"),
        ("kept.nll", lambda x: x[:, :RUN], "1 tokens of it wait to be kept or not; they may be 4 to 8"),
        ("kept.3.value", lambda x: x / 0, "kept.3.value holds numbers that are not finite"),
        ("kept.surprise", None, "has no 'kept.surprise'"),
    ],
)
def test_files_that_no_session_wrote_are_refused(tmp_path: Path, name: str, change: object, message: str) -> None:
    model, path = keeping(), tmp_path / "a.session"
    session = Session(model, INNER)
    session.read(text(30))
    session.save(path)
    tensors, metadata = read_tensors(path, kind="session")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()  # type: ignore[operator]
    own = {k: v for k, v in metadata.items() if k not in ("format", "format_version", "kind")}
    write_tensors_atomically(path, tensors, own, kind="session")
    with pytest.raises(UserError, match=message):
        Session.restore(path, model)


def test_rounded_it_keeps_the_same_tokens(tmp_path: Path) -> None:
    model = keeping(torch.float32)
    session = Session(model, INNER)
    session.read(text(41))
    session.save(tmp_path / "a.session", storage="bfloat16")
    restored = Session.restore(tmp_path / "a.session", model)
    assert session.state.kept is not None
    assert restored.state.kept is not None
    assert torch.equal(restored.state.kept.position, session.state.kept.position)


@pytest.mark.parametrize("learn", [True, False])
def test_what_it_writes_it_has_read(learn: bool) -> None:
    model = keeping()
    session, reader = Session(model, INNER, learn=learn), Session(model, INNER, learn=learn)
    session.read(text(18))
    reader.read(text(18))
    written = list(session.generate(20, temperature=0))
    reader.read(written)
    for x, y in zip(session.state.tensors, reader.state.tensors, strict=True):
        torch.testing.assert_close(x, y)


def test_an_engine_reads_and_writes_side_by_side_what_a_session_does() -> None:
    model, texts = keeping(), [text(18, 1), text(37, 2)]
    with Engine(model, INNER, limits=Limits(device_bytes=2 * largest_session(model), batch_invariant=False)) as engine:
        ids = [engine.create().id for _ in texts]
        for sid, tokens in zip(ids, texts, strict=True):
            engine.append(sid, tokens).result(60)
        tasks = [engine.generate(sid, EngineSampling(max_tokens=15, temperature=0)) for sid in ids]
        written = [[token.id for token in task] for task in tasks]
    for tokens, found in zip(texts, written, strict=True):
        session = Session(model, INNER)
        session.read(tokens)
        assert list(session.generate(15, temperature=0)) == found


def test_texts_at_other_positions_are_read_together_as_alone() -> None:
    model = keeping()
    lengths = (6 * M + 1, 9 * M + 1)
    alone = [read(model, begin(model), torch.tensor([text(n, n)]), inner=INNER).state for n in lengths]
    assert shapes_of(alone[0]) == shapes_of(alone[1])
    more = torch.tensor([text(19, 1), text(19, 2)])
    batch = read(model, together(alone), more, inner=INNER)
    for i, (state, found) in enumerate(zip(alone, apart(batch.state), strict=True)):
        expected = read(model, state, more[i : i + 1], inner=INNER)
        torch.testing.assert_close(batch.nll[i : i + 1], expected.nll)
        for x, y in zip(found.tensors, expected.state.tensors, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_attention_over_further_tokens_is_one_softmax(heads: tuple[int, int]) -> None:
    N, G = heads
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, n: int) -> torch.Tensor:
        return torch.randn(2, count, n, 6, generator=generator, dtype=torch.float64)

    query, own, past, further = draw(N, 4), [draw(G, 4), draw(G, 4)], [draw(G, 7), draw(G, 7)], [draw(G, 3), draw(G, 3)]
    window, none, every = 5, torch.zeros(2, 4, 3, dtype=torch.bool), torch.ones(2, 4, 3, dtype=torch.bool)

    def found(seen: torch.Tensor, window: int) -> torch.Tensor:
        return attention(query, *own, past=tuple(past), window=window, order=1, further=Further(*further, seen))

    plain = reference_attention(query, *own, past=tuple(past), window=window)
    torch.testing.assert_close(found(none, window), plain)
    longer = tuple(torch.cat(pair, 2) for pair in zip(further, past, strict=True))
    torch.testing.assert_close(found(every, 99), reference_attention(query, *own, past=longer, window=None))
    some = every.clone()
    some[0, :, 1] = False  # the first sequence does not see the second of them
    without = [torch.cat((f[:1, :, :1], f[:1, :, 2:], p[:1]), 2) for f, p in zip(further, past, strict=True)]
    expected = reference_attention(query[:1], *(x[:1] for x in own), past=(without[0], without[1]), window=None)
    torch.testing.assert_close(found(some, 99)[:1], expected)
    with pytest.raises(ValueError, match="order 0 and 1"):
        attention(query, *own, window=None, order=2, further=Further(*further, every))


def test_training_is_refused() -> None:
    model = keeping()
    ids = torch.tensor([text(8)])
    rest = (ids, ids, torch.ones(1, 8, dtype=torch.bool))
    for loss in (static_loss, lambda *args: end_to_end_loss(*args, inner_lr=1.0, inner_clip=1.0)):
        with pytest.raises(UserError, match=r"model.kept_tokens is 5; training knows no kept tokens, so"):
            loss(model, *rest)
    with pytest.raises(UserError, match="training knows no kept tokens"):
        RunConfig(
            name="a", model=model.config, optimizer=OptimizerConfig(lr=1e-3), context_length=8, batch_size=1, steps=1
        )


def test_formats_that_cannot_say_it_are_refused(tmp_path: Path) -> None:
    model = keeping()
    with pytest.raises(UserError, match="the official layout knows no kept tokens"):
        export_official(tmp_path / "official", model, INNER)
    with pytest.raises(UserError, match="a plain model knows no kept tokens"):
        plain_of(model.config, {})


def test_a_verifier_takes_no_tokens_back_then() -> None:
    session = Session(keeping(), INNER, learn=False)
    with pytest.raises(UserError, match="a verifier knows no kept tokens"):
        Speculation(session, session.fork())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "full"}, "goes with windowed attention in every block alike"),
        ({"block_windows": (0, 0, 4, 0)}, "goes with windowed attention in every block alike"),
        ({"attention_soft_cap": 3.0}, "goes with windowed attention in every block alike"),
        ({"window_size": 3}, "model.window_size 3 is less than model.mini_batch_size 4"),
        ({"kept_distance": 5}, "model.kept_distance is 5; it must be at least 6"),
        ({"kept_run": 0}, "model.kept_run is 0; it must be at least 1"),
        ({"kept_tokens": -1}, "model.kept_tokens is -1; it must be at least 0"),
    ],
)
def test_what_cannot_be_kept_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny.config(**({"kept_tokens": 5} | changes))


def test_a_model_that_was_not_trained_for_it_is_opened_keeping(tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", seed=1)
    opened = open_model(tmp_path / "model", "cpu")
    keeps = opened.keeping(16, run=4)
    assert keeps.model.embedding.weight.data_ptr() == opened.model.embedding.weight.data_ptr()
    assert keeps.fingerprint != opened.fingerprint
    plain, session = opened.session(), keeps.session()
    before, found = plain.read(TEXT), session.read(TEXT)
    assert torch.equal(found[1:48], before[1:48])
    assert not torch.allclose(found[100:], before[100:])
    session.save(tmp_path / "a.session")
    assert torch.equal(keeps.restore(tmp_path / "a.session").read("More."), session.read("More."))


def test_its_fingerprint_is_of_no_type_of_numbers_and_no_history(tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", seed=1)
    opened = open_model(tmp_path / "model", "cpu")
    half = opened._replace(model=copy.deepcopy(opened.model).bfloat16())
    keeping = opened.keeping(16)
    assert half.keeping(16).fingerprint == keeping.fingerprint == opened.keeping(8).keeping(16).fingerprint
    assert len({opened.fingerprint, keeping.fingerprint, opened.keeping(16, run=4).fingerprint}) == 3
    assert keeping.keeping(16) is keeping
    session = opened.keeping(16, run=4).session()
    session.read(TEXT)
    session.save(tmp_path / "s")
    assert opened.restore(tmp_path / "s").model.config.kept_run == 4


def saved(tmp_path: Path) -> tuple[OpenModel, dict[str, Tensor], dict[str, Any]]:
    """A session that keeps tokens is in tmp_path / "s": its model, and what the file holds."""
    save_small_model(tmp_path / "model", seed=1)
    opened = open_model(tmp_path / "model", "cpu")
    session = opened.keeping(16).session()
    session.read(TEXT)
    session.save(tmp_path / "s")
    return opened, *read_tensors(tmp_path / "s", kind="session")


@pytest.mark.parametrize("kept", [3, "all", {"tokens": 16}, {"tokens": -1, "run": 1, "distance": None}])
def test_files_that_do_not_say_what_is_kept_are_refused(tmp_path: Path, kept: object) -> None:
    opened, tensors, metadata = saved(tmp_path)
    write_tensors_atomically(tmp_path / "s", tensors, metadata | {"kept": kept}, kind="session")
    with pytest.raises(UserError, match=r"is no valid session: it keeps|model.kept_tokens is -1"):
        opened.restore(tmp_path / "s")


def test_files_of_another_rule_of_choice_are_refused(tmp_path: Path) -> None:
    """Surprise on another scale would never be replaced, or at once."""
    opened, tensors, metadata = saved(tmp_path)
    before = {"model_fingerprint": metadata["model_fingerprint"].rpartition(".")[0]}
    del metadata["kept"]["rule"]
    write_tensors_atomically(tmp_path / "s", tensors, metadata | before, kind="session")
    with pytest.raises(UserError, match="by another rule; read its text again"):
        opened.restore(tmp_path / "s")


def test_an_engine_refuses_a_directory_of_another_rule_and_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(keeping(), INNER, directory=tmp_path / "engine") as engine:
        engine.append(engine.create().id, text(30)).result(60)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    monkeypatch.setattr("longread.model.fingerprint.KEPT_RULE", 2)
    with pytest.raises(UserError, match="belong to another model"):
        Engine(keeping(), INNER, directory=tmp_path / "engine")
    assert {path: path.read_bytes() for path in before} == before


def test_the_command_line_takes_a_model_that_keeps_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_small_model(tmp_path / "model", seed=1)
    keeps = open_model(tmp_path / "model", "cpu").keeping(16, run=4)
    save_model(tmp_path / "kept", keeps.model, keeps.inner, ByteTokenizer().fingerprint)
    ByteTokenizer().save(tmp_path / "kept")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    kept, book, saved = (str(tmp_path / name) for name in ("kept", "text.txt", "a.session"))
    assert command(["estimate", kept]) == 0
    assert "of that 16 tokens kept beyond the window" in capsys.readouterr().out
    assert command(["evaluate", kept, "--full", kept, "--data", book, "--max-tokens", "257"]) == 0
    assert command(["read", book, "--model", kept, "--save", saved]) == 0
    assert command(["generate", "--model", kept, "--session", saved, "--max-tokens", "5"]) == 0
    assert command(["train", kept, "--data", book, "--out", str(tmp_path / "run")]) == 2
    assert "training knows no kept tokens" in capsys.readouterr().err


def test_sizes_and_operations_count_what_is_kept() -> None:
    model = keeping(torch.float32)
    state = read(model, begin(model), torch.tensor([text(20 * M)]), inner=INNER).state
    assert state.nbytes == largest_session(model)
    plain = dataclasses.replace(model.config, kept_tokens=0)
    more = 2 * model.config.num_blocks * model.config.kv_width * KEPT * 4
    assert decoding_bytes(model.config, 99, 4) - decoding_bytes(plain, 99, 4) == more
    assert reading_flops(plain, 99) < reading_flops(model.config, 99) < reading_flops(_full(plain), 99)
    assert reading_flops(plain, W) == reading_flops(model.config, W)


def _full(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, attention="full")
