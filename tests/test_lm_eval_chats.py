"""Chats of lm-evaluation-harness: templates, special tokens, and where an answer ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longread.config import UserError
from longread.loading import open_model
from longread.session import Sampling
from longread.tokenizer import BOS, ByteTokenizer, HuggingFaceTokenizer, train_bpe
from tests.lm_eval_readers import TEXT, asked, harness_model, save, write_task

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), ByteTokenizer())


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, and special tokens in it."""
    raw = train_bpe([TEXT], 300)._tokenizer
    raw.add_special_tokens(["<|turn|>", "<|end|>", "</s>"])
    place = save(tmp_path_factory.mktemp("chat"), HuggingFaceTokenizer(raw))
    facts = {"bos_token": BOS, "eos_token": {"content": "</s>"}, "chat_template": CHAT}
    (place / "tokenizer_config.json").write_text(json.dumps(facts))
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [raw.token_to_id("<|end|>"), 99_999]}))
    return place


def test_special_tokens_mean_themselves_in_chats_alone(chatting: Path) -> None:
    model = harness_model(chatting)
    tokenizer = open_model(chatting, "cpu").tokenizer
    bos, end = tokenizer.bos_id, model._prompts.special["<|end|>"]
    assert model.tok_encode("a<|end|>") == [bos, *tokenizer.encode("a<|end|>")]
    assert end not in model._prompts.prompt("a<|end|>")
    assert model.eot_token_id == model._prompts.special["</s>"]
    messages = [{"role": "user", "content": "The night?"}]
    text = model.apply_chat_template(messages)
    assert text == f"{BOS}<|turn|>user\nThe night?<|end|>\n<|turn|>assistant\n"
    turn = model._prompts.special["<|turn|>"]
    expected = [bos, turn, *tokenizer.encode("user\nThe night?"), end, *tokenizer.encode("\n")]
    expected += [turn, *tokenizer.encode("assistant\n")]
    assert model._prompts.prompt(text) == expected
    assert model.chat_template(True) == CHAT
    begun = [*messages, {"role": "assistant", "content": "It waits "}]
    assert model.apply_chat_template(begun, add_generation_prompt=False).endswith("<|turn|>assistant\nIt waits")
    model.generate_until(asked([(text, {"until": ["</s>"], "max_gen_toks": 3})]))


def test_an_answer_ends_at_the_tokens_that_end_one(chatting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = harness_model(chatting)
    tokenizer = open_model(chatting, "cpu").tokenizer
    special = model._prompts.special
    assert model._prompts.ends == {tokenizer.bos_id, special["</s>"], special["<|end|>"]}
    texts, ends = model._prompts.stops(["\n", "<|turn|>", ""])
    assert texts == ("\n",)
    assert ends == model._prompts.ends | {special["<|turn|>"]}
    from longread.lm_eval.writing import GenerationSettings, _GeneratedAnswer

    settings = GenerationSettings(Sampling(max_tokens=9, temperature=0), ())
    answer = _GeneratedAnswer(model._prompts, (1, 2), settings, 0, 16)
    for token in [*tokenizer.encode("the lamp"), special["<|end|>"], *tokenizer.encode(" burns")]:
        answer.take(token)
    assert answer.ended
    assert answer.text() == "the lamp"


def test_templates_that_are_not_there(directory: Path, chatting: Path, tmp_path: Path) -> None:
    from longread.lm_eval.chat import find_template, rendered

    with pytest.raises(UserError, match="has no chat template; leave out apply_chat_template"):
        harness_model(directory).chat_template(True)
    with pytest.raises(UserError, match="no chat template 'tools'"):
        harness_model(chatting).chat_template("tools")
    several = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert (find_template(tmp_path), find_template(tmp_path, "tools")) == ("D", "T")
    (tmp_path / "chat_template.jinja").write_text("F")
    assert find_template(tmp_path) == "F"
    with pytest.raises(UserError, match="refuses this chat: only users"):
        rendered("{{ raise_exception('only users') }}", [], tmp_path, add_generation_prompt=True)


def test_the_harness_puts_chats_to_it(chatting: Path, tmp_path: Path) -> None:
    import lm_eval
    import lm_eval.tasks

    model = harness_model(chatting)
    answering = write_task(tmp_path) | {
        "task": "answering",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["<|turn|>"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[answering],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    (sample,) = [sample for sample in found["samples"]["answering"] if sample["doc"]["text"] == "x"]
    context = f"{BOS}<|turn|>user\nx<|end|>\n<|turn|>assistant\n"
    assert sample["arguments"][0][0] == context
    session = open_model(chatting, "cpu").session()
    session.read(model._prompts.prompt(context))
    ids = session.generate(4, temperature=0, stop_ids=[*model._prompts.ends, model._prompts.special["<|turn|>"]])
    assert sample["resps"] == [[session.tokenizer.decode(ids)]]


def test_a_continuation_that_changes_the_last_token_of_its_context(chatting: Path) -> None:
    from longread.lm_eval.prompts import Prompts

    tokenizer = open_model(chatting, "cpu").tokenizer
    prompts = Prompts(tokenizer, chatting, tokenizer.vocab_size)
    whole = [tokenizer.bos_id, *tokenizer.encode("the lamp")]
    assert prompts.pair("the la", "mp") == (whole[:-1], whole[-1:])  # " lamp" is one token
    assert prompts.pair("the ", "lamp") == (whole[:-1], whole[-1:])
    assert prompts.pair(" ", "lamp") == (whole[:1], tokenizer.encode(" lamp"))
    assert prompts.pair("", " lamp") == (whole[:1], tokenizer.encode(" lamp"))
    assert prompts.pair("the", "") == (whole[:-1], [])
