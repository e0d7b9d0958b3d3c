"""Readers in Transformers: what `generate` and `forward` give is what sessions give, in batches and in pieces too."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from longread.inner_loop import begin, next_token_logits, read
from longread.loading import open_model
from longread.transformers import LongreadForCausalLM, SessionCache
from longread.transformers.versions import CACHE
from tests.small_model import save_small_model
from tests.transformers_readers import IDS, K, M, assert_same, greedy, one, padded, session_of, written


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "reader"
    save_small_model(directory, seed=3, window_size=16, mini_batch_size=8)
    return directory


@pytest.fixture(scope="module")
def model(place: Path) -> LongreadForCausalLM:
    return AutoModelForCausalLM.from_pretrained(place)


@pytest.fixture(scope="module")
def exact(place: Path) -> LongreadForCausalLM:
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64)


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 17}, {"prefill_chunk_size": 1}], ids=str)
def test_greedy_writing_is_that_of_a_session(model: LongreadForCausalLM, settings: dict, learn: bool) -> None:
    """Token for token over several inner steps, and the cache is that session; in one piece to the last bit."""
    prompt, count = IDS[: 5 * M + 3], 3 * M
    session = session_of(model, prompt, learn=learn)
    expected = list(session.generate(count, temperature=0))
    found = greedy(model, count, inputs=one(prompt), learn=learn, **settings)
    assert found.sequences[0].tolist() == prompt + expected
    other = session_of(model, prompt, learn=learn)
    list(other.generate(count - 1, temperature=0))  # the last token is not read
    assert_same(found[CACHE].sessions[0], other, 1e-5 if settings else 0.0)
    assert found[CACHE].sessions[0].learn == learn
    assert (session.steps > 6) == learn


def test_without_a_cache_it_is_the_same(model: LongreadForCausalLM) -> None:
    found = model.generate(one(IDS[:21]), max_new_tokens=6, do_sample=False, use_cache=False, eos_token_id=None)
    assert found[0, 21:].tolist() == written(model, IDS[:21], 6)


@pytest.mark.parametrize("first", [1, M - 3, M, 2 * M])
def test_it_goes_on_from_a_cache(model: LongreadForCausalLM, first: int) -> None:
    """With the whole text again, or with what is new alone; in chunks too."""
    prompt = IDS[: 3 * M + 1]
    expected = prompt + written(model, prompt, 3 * M)
    begun = greedy(model, first, inputs=one(prompt))
    assert begun.sequences[0].tolist() == expected[: len(prompt) + first]
    ways = [{"inputs": begun.sequences}, {"inputs": begun.sequences[:, -1:]}, {"inputs": begun.sequences}]
    ways[2]["prefill_chunk_size"] = 5
    for way in ways:
        cache = copy.deepcopy(begun[CACHE])
        found = greedy(model, 3 * M - first, **way, **{CACHE: cache})
        assert found.sequences[0, -(3 * M - first) :].tolist() == expected[len(prompt) + first :]
        assert found[CACHE] is cache
        assert cache.get_seq_length() == cache.position(0) == len(expected) - 1
    assert begun[CACHE].position(0) == len(prompt) + first - 1


def test_new_tokens_may_be_more_than_all_before(model: LongreadForCausalLM) -> None:
    """They are told from a text whose beginning was read by what was read last."""
    begun, more = greedy(model, 3, inputs=one(IDS[:5])), IDS[30 : 30 + 2 * M]
    text = [*begun.sequences[0].tolist()[:-1], *more]
    found = greedy(model, 4, inputs=one(more), **{CACHE: begun[CACHE]})
    assert found.sequences[0, -4:].tolist() == written(model, text, 4)


def test_a_cache_is_saved_and_restored_as_a_session(model: LongreadForCausalLM, place: Path, tmp_path: Path) -> None:
    prompt, path = IDS[: 3 * M + 1], tmp_path / "book.session"
    expected = written(model, prompt, 3 * M)
    begun = greedy(model, M, inputs=one(prompt))
    begun[CACHE].save(path)
    found = greedy(model, 2 * M, inputs=begun.sequences[:, -1:], **{CACHE: SessionCache.restore(path, model)})
    assert found.sequences[0, 1:].tolist() == expected[M:]
    native = open_model(place, "cpu").restore(path)
    native.read(expected[M - 1 : M])
    assert list(native.generate(2 * M, temperature=0)) == expected[M:]
    native.save(path)
    cache = SessionCache.restore(path, model)
    assert cache.get_seq_length() == native.position
    assert_same(cache.sessions[0], native)


def test_logits_are_those_before_each_step(exact: LongreadForCausalLM) -> None:
    """At every token, as if tokens came one by one; in pieces, kept or not, and with the loss of what was read."""
    ids, network = one(IDS[: 3 * M + 2]), exact.network
    state, expected = begin(network), []
    for t in range(ids.shape[1]):
        state = read(network, state, ids[:, t : t + 1], inner=exact.config.inner_config).state
        expected.append(next_token_logits(network, state))
    logits = torch.stack(expected, 1)
    found = exact(ids, labels=ids)
    torch.testing.assert_close(found.logits, logits, rtol=1e-9, atol=1e-9)
    nll = session_of(exact, []).read(ids[0])
    torch.testing.assert_close(found.loss, nll[1:].mean(), rtol=1e-9, atol=1e-9)
    cache, pieces = SessionCache(exact), []
    for part in ids.split([1, M, 1, 1, 2 * M - 1], dim=1):
        pieces += [exact(part, **{CACHE: cache}).logits]
    torch.testing.assert_close(torch.cat(pieces, 1), logits, rtol=1e-9, atol=1e-9)
    assert_same(cache.sessions[0], session_of(exact, ids[0].tolist()), 1e-9)
    for keep in (1, 3):
        torch.testing.assert_close(exact(ids, logits_to_keep=keep).logits, logits[:, -keep:], rtol=1e-9, atol=1e-9)
    some = torch.tensor([2, 9])
    torch.testing.assert_close(exact(ids, logits_to_keep=some).logits, logits[:, some], rtol=1e-9, atol=1e-9)
    frozen = exact(ids, learn=False).logits
    assert (frozen[:, :M] - logits[:, :M]).abs().max() < 1e-9 < 1e-4 < (frozen[:, -1] - logits[:, -1]).abs().max()
    assert found[CACHE].position(0) == 3 * M + 2
    assert CACHE not in exact(ids, use_cache=False)
    as_tuple = exact(ids, labels=ids, return_dict=False)
    assert torch.equal(as_tuple[1], found.logits)


ROWS = [IDS[: 2 * M + 5], IDS[40:41], IDS[60 : 60 + 5 * M], IDS[90 : 90 + 2 * M + 5], IDS[30 : 30 + M]]


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 17}], ids=str)
def test_a_batch_is_its_rows_alone(exact: LongreadForCausalLM, settings: dict) -> None:
    """Padding on the left is not read: each row is a session at a position of its own."""
    count = 2 * M + 3
    found = greedy(exact, count, **padded(ROWS), **settings)
    for row, session, new in zip(ROWS, found[CACHE].sessions, found.sequences[:, -count:], strict=True):
        assert new.tolist() == written(exact, row, count)
        alone = session_of(exact, row + new.tolist()[:-1])
        assert_same(session, alone, 1e-9)
    again = greedy(exact, 5, inputs=found.sequences, **{CACHE: found[CACHE]})  # whose mask nobody gives
    for row, new, more in zip(ROWS, found.sequences[:, -count:], again.sequences[:, -5:], strict=True):
        assert more.tolist() == written(exact, row + new.tolist(), 5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_logits_of_a_padded_batch_are_those_of_its_rows(exact: LongreadForCausalLM, side: str) -> None:
    """Padding predicts what the tokens before it do; before the first nothing is known; the loss is over all tokens."""
    given = padded(ROWS, side)
    labels = torch.where(given["attention_mask"].bool(), given["input_ids"], 5)  # padding is no target all the same
    found = exact(**given, labels=labels)
    losses = []
    for row, logits, mask in zip(ROWS, found.logits, given["attention_mask"].bool(), strict=True):
        alone = exact(one(row), labels=one(row))
        torch.testing.assert_close(logits[mask], alone.logits[0], rtol=1e-9, atol=1e-9)
        losses += [alone.loss] * (len(row) - 1)
        others = logits[~mask]
        expected = torch.zeros_like(others) if side == "left" else alone.logits[0, -1:].expand_as(others)
        torch.testing.assert_close(others, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.loss, torch.stack(losses).mean(), rtol=1e-9, atol=1e-9)
    last = exact(**given, logits_to_keep=1).logits
    torch.testing.assert_close(last, found.logits[:, -1:], rtol=1e-9, atol=1e-9)


def test_a_row_that_has_ended_reads_its_end_and_no_padding(exact: LongreadForCausalLM) -> None:
    rows, count = [ROWS[0], ROWS[2]], 2 * M + 3
    alone = [written(exact, row, count) for row in rows]
    end = next(token for token in alone[0][3:] if token not in alone[1] and token not in alone[0][:3])
    until = alone[0].index(end) + 1
    found = greedy(exact, count, **padded(rows), eos_token_id=end, pad_token_id=9)
    assert found.sequences[0, -count:].tolist() == alone[0][:until] + [9] * (count - until)
    assert found.sequences[1, -count:].tolist() == alone[1]
    first, second = found[CACHE].sessions
    assert_same(first, session_of(exact, rows[0] + alone[0][:until]), 1e-9)
    assert_same(second, session_of(exact, rows[1] + alone[1][:-1]), 1e-9)
    more = torch.cat((found.sequences, torch.tensor([IDS[:3]] * 2)), 1)
    mask = torch.cat((padded(rows)["attention_mask"], found.sequences[:, -count:] != 9, torch.ones(2, 3)), 1)
    again = greedy(exact, 4, inputs=more, attention_mask=mask.long(), **{CACHE: found[CACHE]})
    assert again.sequences[0, -4:].tolist() == written(exact, rows[0] + alone[0][:until] + IDS[:3], 4)
    assert again.sequences[1, -4:].tolist() == written(exact, rows[1] + alone[1] + IDS[:3], 4)


def test_readers_of_one_model_do_not_disturb_each_other(model: LongreadForCausalLM) -> None:
    """By turns, token by token, with the logits of the one looked at after the other has read; to the last bit."""
    prompts = [IDS[:13], IDS[50:70]]
    caches = [SessionCache(model) for _ in prompts]
    rows = [
        model(one(prompt), logits_to_keep=1, **{CACHE: cache}) for prompt, cache in zip(prompts, caches, strict=True)
    ]
    found: list[list[int]] = [[], []]
    for _ in range(2 * M):
        for i, row in enumerate(rows):
            found[i].append(int(row.logits[0, -1].argmax()))
        rows = [model(one(new[-1:]), **{CACHE: cache}) for new, cache in zip(found, caches, strict=True)]
    assert found == [written(model, prompt, 2 * M) for prompt in prompts]


def test_a_fork_goes_on_by_itself(model: LongreadForCausalLM) -> None:
    """Also from a cache with which is being written at the moment."""
    cache = SessionCache(model)
    model(one(IDS[: 2 * M]), **{CACHE: cache})
    model(one(IDS[2 * M : 2 * M + 1]), **{CACHE: cache})
    twin = cache.fork()
    assert torch.equal(twin.sessions[0].state.output, cache.sessions[0].state.output)
    prompt = IDS[: 2 * M + 1]
    for other, question in ((twin, IDS[:2]), (copy.deepcopy(cache), IDS[7:9]), (cache, IDS[3:6])):
        found = greedy(model, M + 2, inputs=one(question), **{CACHE: other})
        assert found.sequences[0, len(question) :].tolist() == written(model, prompt + question, M + 2)


def test_sampling_and_streamers(model: LongreadForCausalLM) -> None:
    class Streamer(BaseStreamer):
        given: list[int]
        ended = False

        def put(self, value: Tensor) -> None:
            self.given = [*getattr(self, "given", []), *value.flatten().tolist()]

        def end(self) -> None:
            self.ended = True

    prompt, settings = one(IDS[:20]), {"max_new_tokens": M + 2, "do_sample": True, "eos_token_id": None}
    torch.manual_seed(1)
    streamer = Streamer()
    first = model.generate(prompt, **settings, streamer=streamer)
    assert streamer.given == first[0].tolist()
    assert streamer.ended
    torch.manual_seed(1)
    assert torch.equal(first, model.generate(prompt, **settings))
    torch.manual_seed(2)
    assert not torch.equal(first, model.generate(prompt, **settings))
    likeliest = model.generate(prompt, **settings, top_k=1)
    assert likeliest[0, 20:].tolist() == written(model, IDS[:20], M + 2)


def test_several_texts_from_one_prompt(exact: LongreadForCausalLM) -> None:
    """From a cache too, which then holds as many."""
    cache = SessionCache(exact)
    exact(one(IDS[:20]), **{CACHE: cache})
    settings = {"do_sample": True, "num_return_sequences": 3, "top_k": 20}
    found = greedy(exact, 12, inputs=one(IDS[:22]), **settings, **{CACHE: cache})
    assert len({tuple(row) for row in found.sequences.tolist()}) == 3
    assert cache.batch_size == 3
    for row, session in zip(found.sequences.tolist(), cache.sessions, strict=True):
        assert_same(session, session_of(exact, row[:-1]), 1e-9)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert [s.recent for s in cache.sessions] == [found.sequences[i, -K - 1 : -1].tolist() for i in (2, 0)]
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length(), cache.get_max_length()) == (-1, 0, -1)


def test_reading_works_under_inference_mode_and_keeps_no_graph(model: LongreadForCausalLM) -> None:
    ids = one(IDS[: 3 * M])
    expected = model(ids)
    assert not expected.logits.requires_grad
    with torch.inference_mode():
        found = model(ids.clone())
        found = model(one(IDS[:2]), **{CACHE: found[CACHE]})
    torch.testing.assert_close(found.logits, model(one(IDS[:2]), **{CACHE: expected[CACHE]}).logits, rtol=0, atol=0)
