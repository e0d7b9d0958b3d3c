"""Readers in Transformers: directories that both libraries open, the pipeline, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from longread.checkpoint import load_model
from longread.config import InnerConfig, ModelConfig, UserError
from longread.evaluate.judges import is_hugging_face
from longread.loading import open_model
from longread.session import Session
from longread.transformers import LongreadConfig, LongreadForCausalLM, SessionCache
from longread.transformers.versions import CACHE
from tests.small_model import TEXT, save_small_model
from tests.transformers_readers import IDS, M, greedy, one, session_of, written


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


def test_a_copy_of_a_model_is_another_model(model: LongreadForCausalLM) -> None:
    """Its network is made of its own modules."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embedding.weight += 0.1
    ids = one(IDS[:20])
    assert (twin(ids).logits - model(ids).logits).abs().max() > 1e-2
    assert twin.double()(ids).logits.dtype == torch.float64
    assert model(ids).logits.dtype == torch.float32


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
