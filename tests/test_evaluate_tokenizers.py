"""Models with different tokenizers: compared in bits per byte, at bytes, on the same bytes of every text."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from longread.checkpoint import save_model
from longread.cli import main
from longread.config import InnerConfig, ModelConfig, UserError
from longread.evaluate import (
    BytePositionLoss,
    Document,
    bin_edges,
    evaluation_charts,
    health_figures,
    html_report,
    in_common,
    measure,
    print_tables,
    summarize,
)
from longread.model import Transformer, initialize
from longread.tokenizer import ByteTokenizer, Tokenizer, train_bpe

INNER = InnerConfig(lr=0.7, clip=0.5)
TEXTS = [" ".join(f"Part {i} of tëxt {k} counts {i * i % 89}." for i in range(12 + 15 * k)) for k in range(3)]
BYTES = ByteTokenizer()
BPE = train_bpe(TEXTS, 320)


def model(tokenizer: Tokenizer) -> Transformer:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        num_blocks=2,
        num_heads=2,
        mlp_hidden=24,
        window_size=16,
        mini_batch_size=8,
        num_suffix_blocks=1,
    )
    made = Transformer(config).double()
    initialize(made, seed=1)
    return made.requires_grad_(False)


def documents(tokenizer: Tokenizer, *, bos: bool = True) -> list[Document]:
    made = []
    for k, text in enumerate(TEXTS):
        ids, lengths = tokenizer.encode_with_bytes(text)
        start = [tokenizer.bos_id] * bos
        made.append(Document(f"text {k}", np.array([*start, *ids]), np.array([0] * bos + lengths)))
    return made


def stored(directory: Path, tokenizer: Tokenizer) -> Path:
    save_model(directory, model(tokenizer).float(), INNER, tokenizer_fingerprint=tokenizer.fingerprint)
    tokenizer.save(directory)
    return directory


@pytest.mark.parametrize("seed", range(20))
def test_every_byte_has_its_share_of_its_token(seed: int) -> None:
    """Against the loss of each single byte, for any tokens, edges, span and pieces."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, 9, size=60)
    nll = np.where(draw.random(60) < 0.1, math.nan, draw.random(60))
    total = int(lengths.sum())
    first, last = sorted(draw.integers(0, total, size=2).tolist())
    edges = np.array(sorted({0, total + 5, *draw.integers(0, total, size=8).tolist()}))
    per_byte, scored = np.zeros(total), np.zeros(total, dtype=bool)
    starts = np.cumsum(lengths) - lengths
    for i in range(1, 60):
        if math.isnan(nll[i]):
            continue
        if lengths[i]:
            per_byte[starts[i] : starts[i] + lengths[i]] += nll[i] / lengths[i]
            scored[starts[i] : starts[i] + lengths[i]] = True
        elif first <= starts[i] <= last and first < last:
            per_byte[min(starts[i], last - 1)] += nll[i]
    per_byte[:first] = per_byte[last:] = 0
    scored[:first] = scored[last:] = False
    loss = BytePositionLoss(edges, (first, last))
    cuts = sorted(draw.integers(0, 60, size=4).tolist())
    for part, sizes in zip(np.split(nll, cuts), np.split(lengths, cuts), strict=True):
        loss.add(part, sizes)
    for a, b in itertools.pairwise(edges):
        nats, _, num_bytes = loss.between(a, b)
        assert nats == pytest.approx(per_byte[a:b].sum(), abs=1e-12)
        assert num_bytes == scored[a:b].sum()
    assert loss.num_positions == last


def test_a_diverged_token_makes_its_bytes_infinite_and_no_others() -> None:
    loss = BytePositionLoss(np.array([0, 4, 8, 12]), (0, 12))
    loss.add(np.array([math.nan, 1.0, math.inf, 2.0]), np.array([0, 3, 4, 5]))
    assert [loss.between(a, a + 4)[0] for a in (0, 4, 8)] == [math.inf, math.inf, pytest.approx(1.6)]


@pytest.mark.parametrize("bos", [pytest.param(True, marks=pytest.mark.slow), False])
def test_both_are_scored_on_the_same_bytes(bos: bool) -> None:
    """Where only one tokenizer begins with BOS, the first bytes are left out for the other too."""
    common = in_common([documents(BYTES), documents(BPE, bos=bos)])
    edges = bin_edges([64, 256], [100])
    found = [
        measure(name, model(tokenizer), INNER, texts, edges, learn=True, bos_id=tokenizer.bos_id)
        for name, tokenizer, texts in zip("ab", (BYTES, BPE), common, strict=True)
    ]
    for one, other, text in zip(found[0].losses, found[1].losses, TEXTS, strict=True):
        assert one.bytes.tolist() == other.bytes.tolist()
        first = 0 if bos else BPE.encode_with_bytes(text)[1][0]
        assert one.total()[2] == len(text.encode()) - first
    a, b = summarize(found, lengths=[64, 256], indices=[100]).results
    places = [(row.start, row.end, row.score.bits_per_byte.n) for row in a.by_position if row.score.bits_per_byte]
    assert places == [(r.start, r.end, r.score.bits_per_byte.n) for r in b.by_position if r.score.bits_per_byte]
    assert [row.context_length for row in a.by_context_length] == [row.context_length for row in b.by_context_length]


def test_texts_that_are_cut_are_compared_where_all_have_read_them() -> None:
    cut = [
        [Document(name, tokens[:50], lengths[:50]) for name, tokens, lengths, _ in documents(tokenizer)]  # type: ignore[index]
        for tokenizer in (BYTES, BPE)
    ]
    few, many = in_common(cut)
    assert [document.common_bytes for document in many] == [(0, 49)] * 3
    assert [len(document.tokens) for document in few] == [50] * 3
    for document in many:  # no token is read beyond what counts
        assert document.byte_lengths is not None
        assert document.byte_lengths[:-1].sum() < 49 <= document.byte_lengths.sum()


def test_the_figures_are_the_losses_of_the_models() -> None:
    common = in_common([documents(BYTES), documents(BPE)])
    found = [
        measure(str(i), model(tokenizer), INNER, texts, bin_edges(), learn=learn, bos_id=tokenizer.bos_id)
        for i, (tokenizer, texts) in enumerate(zip((BYTES, BPE), common, strict=True))
        for learn in (True, False)
    ]
    evaluation = summarize(found)
    alone = [
        summarize([measure("m", model(t), INNER, documents(t), bin_edges(), learn=learn, bos_id=t.bos_id)]).results[0]
        for t in (BYTES, BPE)
        for learn in (True, False)
    ]
    for together, single in zip(evaluation.results, alone, strict=True):
        assert together.loss.bits_per_byte is not None
        assert single.loss.bits_per_byte is not None
        assert together.loss.bits_per_byte.mean == pytest.approx(single.loss.bits_per_byte.mean, rel=1e-12)
        assert together.loss.bits_per_byte.half_width == pytest.approx(single.loss.bits_per_byte.half_width, rel=1e-9)
    for learning, frozen in (evaluation.results[:2], evaluation.results[2:]):
        bits = [result.loss.bits_per_byte for result in (frozen, learning)]
        assert learning.gain_over_frozen is not None
        assert learning.gain_over_frozen.mean == pytest.approx(bits[0].mean - bits[1].mean)  # type: ignore[union-attr]
    # per token the byte model is ahead, on the text it is behind
    byte, bpe = evaluation.results[0].loss, evaluation.results[2].loss
    assert byte.nats_per_token.mean < bpe.nats_per_token.mean
    assert evaluation.loss(byte).mean > 2 * evaluation.loss(bpe).mean


def test_every_output_says_the_unit_and_the_best_is_the_best_per_byte() -> None:
    common = in_common([documents(BYTES), documents(BPE)])
    found = [
        measure(name, model(tokenizer), INNER, texts, bin_edges([64]), learn=True, bos_id=tokenizer.bos_id, close=True)
        for name, tokenizer, texts in zip(("byte", "bpe"), (BYTES, BPE), common, strict=True)
    ]
    evaluation = summarize(found, lengths=[64])
    text = io.StringIO()
    print_tables(evaluation, Console(file=text, width=200))
    page = html_report(evaluation, title="t")
    for shown in (text.getvalue(), page):
        assert "The models have different tokenizers" in shown
        assert "nats" not in shown
        assert f"{sum(len(t.encode()) for t in TEXTS):,} bytes" in shown
        assert "bytes/s" in shown
        assert "tokens/s" not in shown
    best = [f"{row.score.bits_per_byte.mean:.3f}" for row in evaluation.results[1].by_position]  # type: ignore[union-attr]
    assert best
    for figure in best:
        assert f'<td class="best">{figure}' in page
    table = json.loads(json.dumps(evaluation.as_json(), allow_nan=False))
    assert (table["unit"], table["positions"], table["tokens"]) == ("bits per byte", "bytes", None)
    charts = evaluation_charts(evaluation)
    assert [(c.x_label, c.y_label) for c in charts] == [
        ("position, bytes", "bits per byte"),
        ("context length T, bytes", "bits per byte"),
    ]
    shown = [row for row in evaluation.results[0].curve if row.end > 16]
    assert [loss for _, loss in charts[0].lines[0].points] == pytest.approx(
        [row.score.bits_per_byte.mean for row in shown]  # type: ignore[union-attr]
    )
    assert {grid.corner for grid in health_figures(evaluation).grids} == {"tokens of each model's own"}


def test_one_tokenizer_is_compared_by_tokens_as_ever() -> None:
    found = [measure("m", model(BPE), INNER, documents(BPE), bin_edges(), learn=learn) for learn in (True, False)]
    evaluation = summarize(found)
    table = evaluation.as_json()
    assert "unit" not in table
    assert "positions" not in table
    assert (evaluation.unit, evaluation.positions) == ("nats per token", "tokens")
    assert table["tokens"] == sum(len(document.tokens) for document in documents(BPE))


def test_losses_of_different_tokens_are_not_compared() -> None:
    found = [
        measure(name, model(tokenizer), INNER, documents(tokenizer), bin_edges(), learn=True)
        for name, tokenizer in (("byte", BYTES), ("bpe", BPE))
    ]
    with pytest.raises(UserError, match="bpe read other tokens than byte, so their losses per token cannot be"):
        summarize(found)
    unknown = [Document("text 0", documents(BPE)[0].tokens)]
    with pytest.raises(UserError, match="the bytes of the tokens of text 0 are not known"):
        in_common([documents(BYTES)[:1], unknown])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers")
    (path / "texts").mkdir()
    for k, text in enumerate(TEXTS):
        (path / "texts" / f"{k}.txt").write_text(text)
    stored(path / "byte", BYTES)
    stored(path / "bpe", BPE)
    return path


def evaluated(home: Path, *arguments: object) -> int:
    return main([str(a) for a in ["evaluate", home / "byte", home / "bpe", "--device", "cpu", *arguments]])


def test_the_command_compares_texts(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", home / "texts", "--json", tmp_path / "e.json", "--report", tmp_path / "e.html", "--health"]
    assert evaluated(home, *data, "--lengths", 256, 1024, "--indices", 700) == 0
    assert "different tokenizers" in capsys.readouterr().out
    assert "different tokenizers" in (tmp_path / "e.html").read_text()
    figures = json.loads((tmp_path / "e.json").read_text())
    assert (figures["unit"], figures["bytes"]) == ("bits per byte", sum(len(text.encode()) for text in TEXTS))
    assert [result["model"] for result in figures["results"]] == ["byte", "byte", "bpe", "bpe"]
    for result in figures["results"]:  # the BPE model read 1024 bytes in far fewer tokens
        assert [row["context_length"] for row in result["by_context_length"]] == [256, 1024]
        assert result["at_index"][0]["start"] == 700
    # documents of which one tokenizer makes too few tokens are left out for both
    few = len(BPE.encode(TEXTS[0])) + 2
    assert evaluated(home, "--data", home / "texts", "--min-tokens", few, "--json", tmp_path / "f.json") == 0
    assert json.loads((tmp_path / "f.json").read_text())["documents"] == 2


def test_data_sets_of_tokens_are_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(home / "texts"), "--out", str(tmp_path / "d"), "--tokenizer", "bytes"]) == 0
    assert evaluated(home, "--data", tmp_path / "d") == 2
    assert "was prepared with another tokenizer than bpe; give the texts themselves" in capsys.readouterr().err
    index = json.loads((tmp_path / "d" / "index.json").read_text())
    (tmp_path / "d" / "index.json").write_text(json.dumps(index | {"tokenizer": None}))
    assert evaluated(home, "--data", tmp_path / "d") == 2
    assert "does not say of which tokenizer, and the models have different ones" in capsys.readouterr().err
