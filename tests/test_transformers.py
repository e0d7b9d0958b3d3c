"""Readers in Transformers: what `generate` and `forward` give is what sessions give, in batches and in pieces too."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from transformers.generation.streamers import BaseStreamer

from longread.checkpoint import load_model
from longread.config import InnerConfig, ModelConfig, UserError
from longread.evaluate.judges import is_hugging_face
from longread.inner_loop import begin, next_token_logits, read
from longread.loading import open_model
from longread.session import Session
from longread.transformers import LongreadConfig, LongreadForCausalLM, SessionCache
from longread.transformers.versions import CACHE
from tests.small_model import TEXT, save_small_model

M, K = 8, 16  # of the small model
IDS = list(TEXT.encode())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "reader"
    save_small_model(directory, seed=3)
    return directory


@pytest.fixture(scope="module")
def model(place: Path) -> LongreadForCausalLM:
    return AutoModelForCausalLM.from_pretrained(place)


@pytest.fixture(scope="module")
def exact(place: Path) -> LongreadForCausalLM:
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64)


def session_of(model: LongreadForCausalLM, ids: list[int], *, learn: bool = True) -> Session:
    session = Session(model.network, model.config.inner_config, learn=learn)
    session.read(ids)
    return session


def written(model: LongreadForCausalLM, ids: list[int], count: int, *, learn: bool = True) -> list[int]:
    return list(session_of(model, ids, learn=learn).generate(count, temperature=0))


def one(ids: list[int]) -> Tensor:
    return torch.tensor([ids])


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    """Rows with a token in the place of padding that would change everything if it were read."""
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    left = side == "left"
    ids = [[7] * n * left + row + [7] * n * (not left) for n, row in zip(pads, rows, strict=True)]
    mask = [[0] * n * left + [1] * len(row) + [0] * n * (not left) for n, row in zip(pads, rows, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def greedy(model: LongreadForCausalLM, count: int, **given: Any) -> Any:
    """With every token that was written, and the cache."""
    settings = {"max_new_tokens": count, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    return model.generate(**(settings | {"pad_token_id": 0} | given))


def assert_same(found: Session, expected: Session, tolerance: float = 0.0) -> None:
    assert (found.position, found.steps, found.recent) == (expected.position, expected.steps, expected.recent)
    for a, b in zip(found.state.tensors, expected.state.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_auto_classes_open_a_model_directory(place: Path, model: LongreadForCausalLM) -> None:
    loaded = load_model(place)
    assert type(model) is LongreadForCausalLM
    assert not model.training
    assert type(AutoConfig.from_pretrained(place)) is LongreadConfig
    assert model.config.network == loaded.model.config
    assert model.config.inner_config == loaded.inner
    assert model.fingerprint == loaded.fingerprint
    state = loaded.model.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(a, state[name]) for name, a in model.state_dict().items())
    assert model.config.vocab_size == 257
    assert model.generation_config.eos_token_id == 256  # where another text would begin
    assert not is_hugging_face(place)


def test_a_directory_of_before_opens_by_the_name_of_the_class(place: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(place, old)
    values = json.loads((old / "config.json").read_text())
    del values["model_type"], values["architectures"]
    (old / "config.json").write_text(json.dumps(values))
    found = LongreadForCausalLM.from_pretrained(old)
    assert found.fingerprint == load_model(old).fingerprint == load_model(place).fingerprint
    assert type(LongreadForCausalLM.from_pretrained("longread-small").config) is LongreadConfig


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


def test_a_copy_of_a_model_is_another_model(model: LongreadForCausalLM) -> None:
    """Its network is made of its own modules."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embedding.weight += 0.1
    ids = one(IDS[:20])
    assert (twin(ids).logits - model(ids).logits).abs().max() > 1e-2
    assert twin.double()(ids).logits.dtype == torch.float64
    assert model(ids).logits.dtype == torch.float32


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


def test_a_half_precision_file_reads_on_a_cpu_as_a_session_does(place: Path, tmp_path: Path) -> None:
    half = LongreadForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(place).save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found.dtype == torch.bfloat16
    session = open_model(tmp_path, "cpu").session()
    session.read(IDS[: 3 * M])
    out = greedy(found, M + 1, inputs=one(IDS[: 3 * M]))
    assert out.sequences[0, 3 * M :].tolist() == list(session.generate(M + 1, temperature=0))
    out[CACHE].save(tmp_path / "a.session")
    assert SessionCache.restore(tmp_path / "a.session", found).sessions[0].state.output.dtype == torch.float32


def test_what_is_saved_opens_everywhere(place: Path, model: LongreadForCausalLM, tmp_path: Path) -> None:
    """Equal files of weights; the settings of Transformers are kept beside those of Longread."""
    target = tmp_path / "saved"
    frozen = LongreadForCausalLM.from_pretrained(place, learn=False)
    assert frozen.config.learn is False
    frozen.config.learn = True
    frozen.generation_config.repetition_penalty = 1.25
    frozen.save_pretrained(target)
    assert (target / "model.safetensors").read_bytes() == (place / "model.safetensors").read_bytes()
    loaded, before = load_model(target), load_model(place)
    assert (loaded.fingerprint, loaded.inner, loaded.model.config) == (
        before.fingerprint,
        before.inner,
        before.model.config,
    )
    assert loaded.metadata["tokenizer_fingerprint"] == before.metadata["tokenizer_fingerprint"]
    again = AutoModelForCausalLM.from_pretrained(target)
    assert again.generation_config.repetition_penalty == 1.25
    assert again.fingerprint == before.fingerprint
    assert torch.equal(again(one(IDS[:20])).logits, model(one(IDS[:20])).logits)
    AutoTokenizer.from_pretrained(place).save_pretrained(target)
    assert open_model(target, "cpu").fingerprint == before.fingerprint


def test_what_reads_frozen_says_so_in_its_file(place: Path, tmp_path: Path) -> None:
    model = LongreadForCausalLM.from_pretrained(place)
    model.config.learn = False
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["learns"] is False
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not found.config.learn
    assert not SessionCache(found).learn
    assert greedy(found, 9, inputs=one(IDS[: 3 * M])).sequences[0, -9:].tolist() == written(
        model, IDS[: 3 * M], 9, learn=False
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path, learn=True).config.learn


def test_a_model_of_any_dials_is_saved_and_opened(tmp_path: Path) -> None:
    """Untied, with fields that files leave out otherwise, made from a configuration alone."""
    network = ModelConfig(
        vocab_size=40,
        width=16,
        num_blocks=3,
        num_heads=4,
        mlp_hidden=24,
        window_size=12,
        mini_batch_size=4,
        num_suffix_blocks=2,
        tie_embeddings=False,
        kv_heads=2,
        qkv_bias=True,
        block_windows=(0, 4, 8),
    )
    config = LongreadConfig(model=network.as_dict(), inner=InnerConfig(lr=0.5).as_dict())
    model = LongreadForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    found, loaded = AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)
    assert found.config.network == loaded.model.config == network
    assert found.get_output_embeddings() is found.head is not None
    ids = torch.randint(1, 40, (1, 15))
    assert torch.equal(found(ids).logits, model(ids).logits)
    session = Session(loaded.model, loaded.inner)
    session.read(ids[0])
    assert greedy(found, 9, inputs=ids).sequences[0, 15:].tolist() == list(session.generate(9, temperature=0))


def test_pipeline(place: Path, model: LongreadForCausalLM) -> None:
    """Texts in batches, which begin with BOS and are padded by the tokenizer."""
    write = pipeline("text-generation", model=str(place), device="cpu")
    texts = [TEXT[:50], TEXT[100:113], TEXT[200:290]]
    found = write(texts, max_new_tokens=12, do_sample=False, batch_size=3, return_full_text=False)
    for text, (answer,) in zip(texts, found, strict=True):
        session = open_model(place, "cpu").session()
        assert answer["generated_text"] == "".join(session.write(text, max_tokens=12, temperature=0))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"num_beams": 2}, "num_beams is 2: what a reader has learned cannot be taken back"),
        ({"num_beams": 2, "do_sample": True}, "num_beams is 2"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams is 3"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha is 0.6"),
        ({"prompt_lookup_num_tokens": 3}, "generation mode is assisted_generation: what a reader has learned"),
        ({"cache_implementation": "static"}, "a reader has a cache of its own"),
        ({"inputs_embeds": torch.zeros(1, 3, 16)}, "a reader reads token ids"),
        ({CACHE: object()}, "the cache is of no reader of this model"),
    ],
)
def test_what_a_reader_cannot_do_is_refused_up_front(model: LongreadForCausalLM, given: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        model.generate(one(IDS[:5]), max_new_tokens=3, **given)


def test_wrong_input_is_one_sentence(model: LongreadForCausalLM, exact: LongreadForCausalLM, tmp_path: Path) -> None:
    cache = SessionCache(model)
    model(one(IDS[:5]), **{CACHE: cache})
    refusals: list[tuple[dict, str]] = [
        ({"input_ids": None}, "input_ids have shape None"),
        ({"input_ids": one([])}, r"input_ids have shape \[1, 0\]"),
        ({"input_ids": one([1, 257])}, "token id 257 is not in the vocabulary of 257"),
        ({"input_ids": one(IDS[:3]), "position_ids": one([0, 1, 2])}, "a reader has no use for position_ids"),
        ({"input_ids": one(IDS[:3]), "attention_mask": torch.ones(1, 2)}, r"attention_mask has shape \[1, 2\]"),
        ({"input_ids": one(IDS[:3]).repeat(2, 1), CACHE: cache}, "the cache holds 1 sequences, and 2 are given"),
        ({"input_ids": one(IDS[:3]), CACHE: SessionCache(exact)}, "the cache is of no reader of this model"),
    ]
    for given, reason in refusals:
        with pytest.raises(UserError, match=reason):
            model(**given)
    assert cache.position(0) == 5
    for call, reason in (
        (lambda: cache.crop(-1), "cannot unlearn"),
        (lambda: cache.reorder_cache(torch.tensor([0])), "follows no beams"),
        (lambda: SessionCache.of(model, []), "there is no session"),
        (lambda: SessionCache.of(model, [session_of(exact, [1])]), "of another model"),
        (lambda: SessionCache.of(model, [session_of(model, [1]), session_of(model, [1], learn=False)]), "otherwise"),
        (lambda: SessionCache(model).save(tmp_path / "s"), "the cache holds 0 sessions"),
        (lambda: greedy(model, 2, inputs=one([1, 2]), use_cache=False, **{CACHE: cache}), "use_cache is False"),
        (lambda: model.generate_batch([IDS[:5]]), "continuous batching"),
        (lambda: model.resize_token_embeddings(300), "the vocabulary of a reader is fixed"),
        (lambda: model.save_pretrained(tmp_path, push_to_hub=True), "only writes files"),
        (lambda: LongreadConfig(model={"width": 3}), "ModelConfig"),
        (lambda: LongreadConfig.from_dict({"model_type": "llama", "hidden_size": 3}), "describes no Longread model"),
    ):
        with pytest.raises(UserError, match=reason):
            call()


@pytest.mark.parametrize("fault", ["missing", "unknown"])
def test_weights_that_do_not_fit_are_refused(place: Path, tmp_path: Path, fault: str) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(place, tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    if fault == "missing":
        del state["final_norm.weight"]
    else:
        state["other.weight"] = torch.ones(2)
    save_file(state, tmp_path / "m" / "model.safetensors")
    name = "lacks final_norm.weight" if fault == "missing" else "holds.*other.weight"
    with pytest.raises(UserError, match=name):
        LongreadForCausalLM.from_pretrained(tmp_path / "m")
