"""Readers in lm-evaluation-harness: every request is scored and continued as a session of its own does it."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from longread.checkpoint import save_model
from longread.config import InnerConfig, ModelConfig, UserError
from longread.loading import OpenModel, open_model
from longread.model import Transformer, initialize
from longread.tokenizer import BOS, ByteTokenizer, HuggingFaceTokenizer, Tokenizer, train_bpe

M = 16
TEXT = "The keeper trims the lamp, and the lamp burns; the keeper waits, and the night waits with him. " * 3
DOCUMENTS = [TEXT, "Grüße aus dem Tal: es regnet.", "x", TEXT[40:200]]


class Request(NamedTuple):
    """As the harness hands one over."""

    args: tuple[Any, ...]


def save(directory: Path, tokenizer: Tokenizer, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Path:
    """A model of two blocks whose learning shows, with its tokenizer."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        num_blocks=2,
        num_heads=2,
        mlp_hidden=24,
        window_size=16,
        mini_batch_size=M,
        num_suffix_blocks=1,
    )
    model = Transformer(config).to(dtype)
    initialize(model, seed=seed)
    save_model(directory, model, InnerConfig(lr=2.0, clip=2.0), tokenizer_fingerprint=tokenizer.fingerprint)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), ByteTokenizer())


@pytest.fixture(scope="module")
def opened(directory: Path) -> OpenModel:
    return open_model(directory, "cpu")


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = train_bpe([TEXT], 300)._tokenizer
    return save(tmp_path_factory.mktemp("without-bos"), HuggingFaceTokenizer(raw, has_bos=False))


def harness_model(directory: Path, **arguments: Any) -> Any:
    """The harness's model, as the harness makes it."""
    from longread.lm_eval import LongreadLM

    return LongreadLM.create_from_arg_obj({"pretrained": str(directory)} | arguments, {"device": "cpu"})


def asked(pairs: Sequence[tuple[Any, ...]]) -> list[Request]:
    return [Request(pair) for pair in pairs]


def directly(opened: OpenModel, context: Sequence[int], continuation: Sequence[int], learn: bool = True) -> float:
    """log p by a session that reads the one and then the other."""
    session = opened.session(learn=learn)
    session.read(context)
    return -session.read(continuation).double().sum().item()


PAIRS = [
    (TEXT[:n], continuation)
    for n in (1, M - 2, M - 1, M, 100)
    for continuation in (" and", "xyz", TEXT[n : n + 2 * M + 1])
]


@pytest.mark.parametrize("learn", [True, False])
def test_likelihoods_are_those_of_a_session_to_the_last_digit(directory: Path, opened: OpenModel, learn: bool) -> None:
    found = harness_model(directory, learn=learn).loglikelihood(asked(PAIRS), disable_tqdm=True)
    bos = opened.tokenizer.beginning
    for (context, continuation), (log_likelihood, _) in zip(PAIRS, found, strict=True):
        spaces = len(context) - len(context.rstrip())  # these count for the continuation
        ids = opened.tokenizer.encode(context + continuation)
        begins = len(opened.tokenizer.encode(context)) - spaces
        assert log_likelihood == directly(opened, [*bos, *ids[:begins]], ids[begins:], learn)


def test_greedy_is_what_a_session_would_write(directory: Path, opened: OpenModel) -> None:
    from longread.lm_eval.scoring import Reader, score

    context, pairs = (256, *TEXT[:50].encode()), []
    session = opened.session()
    session.read(context)
    written = list(session.generate(2 * M + 3, temperature=0))
    for n in (1, M, len(written)):
        pairs += [(context, tuple(written[:n])), (context, (*written[: n - 1], (written[n - 1] + 1) % 257))]
    reader = Reader(opened.model, opened.inner, learn=True)
    found = dict(score(reader, pairs, batch_size=4))
    assert [found[i].is_greedy for i in range(len(pairs))] == [True, False] * 3
    frozen = dict(score(Reader(opened.model, opened.inner, learn=False), pairs, batch_size=4))
    assert not frozen[4].is_greedy  # other weights would write something else


def test_a_batch_gives_what_single_requests_give(directory: Path, tmp_path: Path) -> None:
    pairs = [(TEXT[i : i + 60], TEXT[i + 60 : i + 64 + i % 2]) for i in range(0, 40, 4)]
    alone, together = (
        harness_model(directory, batch_size=n).loglikelihood(asked(pairs), disable_tqdm=True) for n in (1, 7)
    )
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert [x for x, _ in together] == pytest.approx([x for x, _ in alone], rel=1e-13)
    alone, together = (
        harness_model(directory, batch_size=n, dtype="float32").loglikelihood(asked(pairs), disable_tqdm=True)
        for n in (1, 7)
    )
    assert [x for x, _ in together] == pytest.approx([x for x, _ in alone], abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_requests_know_nothing_of_each_other(directory: Path, batch_size: int) -> None:
    model = harness_model(directory, batch_size=batch_size)
    pairs = PAIRS + PAIRS[:4]
    shuffled = random.Random(0).sample(range(len(pairs)), len(pairs))
    found = model.loglikelihood(asked(pairs), disable_tqdm=True)
    again = model.loglikelihood(asked([pairs[i] for i in shuffled]), disable_tqdm=True)
    assert [again[shuffled.index(i)] for i in range(len(pairs))] == found
    wishes = [(TEXT[: 20 + i % 3], {"until": ["q"], "max_gen_toks": 12, "temperature": 0.8}) for i in range(6)]
    written = model.generate_until(asked(wishes), disable_tqdm=True)
    model.loglikelihood_rolling(asked([(TEXT,)]), disable_tqdm=True)
    assert model.generate_until(asked(wishes), disable_tqdm=True) == written


def test_a_shared_context_is_read_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longread.lm_eval import scoring

    read, tokens = scoring.read, []
    monkeypatch.setattr(
        scoring, "read", lambda *args, **options: tokens.append(args[2].numel()) or read(*args, **options)
    )
    pairs = [("x" * 99, f" {choice}") for choice in "ABCD"]
    harness_model(directory).loglikelihood(asked(pairs), disable_tqdm=True)
    assert sorted(tokens) == [2, 2, 2, 2, 100]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_reader_that_learning_has_broken_is_rescued_as_a_session_is(
    directory: Path, opened: OpenModel, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    pairs = [(TEXT[i : i + 50] + ".", "abc") for i in range(3)]
    model = harness_model(directory, batch_size=batch_size)
    unharmed = model.loglikelihood(asked(pairs))
    rule = sys.modules["longread.inner_loop.rescue"]
    monkeypatch.setattr(rule, "MARGIN", -10.0)  # every reader counts as broken
    found = model.loglikelihood(asked(pairs))
    expected = [directly(opened, [256, *context.encode()], [*b"abc"]) for context, _ in pairs]
    assert [x for x, _ in found] == pytest.approx(expected, rel=1e-13)
    assert all(abs(x - y) > 1e-6 for (x, _), (y, _) in zip(found, unharmed, strict=True))


def test_a_model_that_is_read_frozen_by_itself(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = OpenModel.session
    monkeypatch.setattr(OpenModel, "session", lambda self, learn=False: session(self, learn=learn))
    assert not harness_model(directory).learn
    assert "is read frozen, as it says itself; learn=true learns" in caplog.text
    assert harness_model(directory, learn="true").learn


def test_learning_helps_where_a_prompt_repeats_itself(directory: Path) -> None:
    pair = [("abcdefghijklmnopqrstuvwxyz" * 12, "abcdefgh")]
    learned, frozen = (
        harness_model(directory, learn=learn).loglikelihood(asked(pair))[0][0] for learn in (True, False)
    )
    assert learned > frozen + 0.5
    short = [("abc", "de")]  # no mini-batch is complete
    learned, frozen = (
        harness_model(directory, learn=learn).loglikelihood(asked(short))[0][0] for learn in (True, False)
    )
    assert learned == pytest.approx(frozen, rel=1e-13)


def test_documents_are_read_as_longread_reads_them(directory: Path, opened: OpenModel) -> None:
    found = harness_model(directory).loglikelihood_rolling(asked([(text,) for text in [*DOCUMENTS, ""]]))
    assert found[-1] == 0
    assert found[:-1] == [-opened.session().read(text).double().sum().item() for text in DOCUMENTS]


def test_nothing_predicts_the_first_token_where_the_tokenizer_has_no_bos(without_bos: Path) -> None:
    opened = open_model(without_bos, "cpu")
    assert opened.tokenizer.bos_id is None
    ids = opened.tokenizer.encode(TEXT)
    model = harness_model(without_bos)
    assert model.prefix_token_id is None
    assert model.eot_token_id is None
    losses = opened.session().read(ids).double()
    assert losses[0].isnan()
    assert model.loglikelihood_rolling(asked([(TEXT,)])) == [-losses[1:].sum().item()]
    short = TEXT[:20]
    own = opened.tokenizer.encode(short)
    (scored, _), (single, greedy) = model.loglikelihood(asked([("", short), ("", "T")]))
    assert scored == pytest.approx(-opened.session().read(own)[1:].double().sum().item(), rel=1e-13)
    assert (single, greedy) == (0, True)
    with pytest.raises(UserError, match="give prefix_token_id"):
        model.generate_until(asked([("", {"until": ["\n"]})]))

    prefixed = harness_model(without_bos, prefix_token_id=3)
    assert prefixed.loglikelihood_rolling(asked([(TEXT,)])) == [
        -opened.session().read([3, *ids])[1:].double().sum().item()
    ]
    assert prefixed.loglikelihood(asked([("", short)]))[0][0] == directly(opened, [3], own)
    assert prefixed.loglikelihood(asked([("A", "B")])) == model.loglikelihood(asked([("A", "B")]))
    prefixed.generate_until(asked([("", {"until": ["\n"], "max_gen_toks": 2})]))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_is_written_is_what_a_session_writes(directory: Path, opened: OpenModel, batch_size: int) -> None:
    prompts = [TEXT[:30], TEXT[5:35], TEXT[60:90], TEXT[:7]]

    def session_writes(prompt: str, n: int, stops: Sequence[str] = ()) -> str:
        return "".join(opened.session().write(prompt, max_tokens=n, temperature=0, stops=stops))

    model = harness_model(directory, batch_size=batch_size)
    greedy = {"until": [], "max_gen_toks": 24}
    found = model.generate_until(asked([(prompt, greedy) for prompt in prompts]), disable_tqdm=True)
    assert found == [session_writes(prompt, 24) for prompt in prompts]
    assert len(set(found)) == len(prompts)
    stops = [text[11:13] for text in found]
    wishes = [(prompt, {"until": stop, "max_gen_toks": 24}) for prompt, stop in zip(prompts, stops, strict=True)]
    ended = model.generate_until(asked(wishes), disable_tqdm=True)
    assert ended == [text[: text.index(stop)] for text, stop in zip(found, stops, strict=True)]
    several = model.generate_until(asked([(prompt, {"until": stops, "max_gen_toks": 24}) for prompt in prompts]))
    assert several == [session_writes(prompt, 24, stops) for prompt in prompts]
    assert model.generate_until(asked([(prompts[0], {"until": [], "max_gen_toks": 0})])) == [""]


def test_a_session_draws_the_same(directory: Path, opened: OpenModel) -> None:
    from longread.lm_eval.scoring import Reader
    from longread.lm_eval.writing import Writing, _seed, write

    model = harness_model(directory)
    wish = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2}
    settings = Writing.of(wish | {"max_gen_toks": 20}, max_tokens=5)
    prompt = (256, *TEXT[:33].encode())
    (one, two), other = (
        [
            text
            for _, text in sorted(
                write(Reader(opened.model, opened.inner, True), model._prompts, [(prompt, settings)] * n, 2, seed)
            )
        ]
        for n, seed in ((2, 7), (1, 8))
    )
    assert one != two  # the harness asks twice where it wants two answers
    assert [one] != other
    session = opened.session()
    session.read(prompt)
    options = settings._asdict() | {"seed": _seed(7, prompt, settings, 0)}
    del options["until"]
    assert one == opened.tokenizer.decode(session.generate(**options))


def test_seeds_of_the_harness_count(directory: Path) -> None:
    model = harness_model(directory)
    wishes = asked([(TEXT[:20], {"until": [], "max_gen_toks": 9, "do_sample": True})])
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(model.generate_until(wishes)[0])
    assert answers[0] == answers[1] != answers[2]


def test_settings_of_an_answer() -> None:
    from longread.lm_eval.writing import Writing

    def of(**asked: Any) -> Writing:
        return Writing.of(asked, max_tokens=64)

    assert of() == Writing(64, 0.0, 1.0, None, 1.0, ())
    assert of(until="a", max_new_tokens=3) == Writing(3, 0.0, 1.0, None, 1.0, ("a",))
    assert of(temperature=0.5).temperature == 0.5
    assert of(temperature=0.5, do_sample=False).temperature == 0
    assert of(do_sample=True).temperature == 1
    assert of(do_sample=True, temperature=0).temperature == 0
    assert of(top_k=0, num_beams=1).top_k is None
    assert of(max_gen_toks=1, max_tokens=2).max_tokens == 1
    for wrong, reason in (
        ({"num_beams": 4}, "num_beams is 4"),
        ({"min_p": 0.1}, "knows no 'min_p'"),
        ({"temperature": -1.0, "do_sample": True}, "temperature is -1.0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
    ):
        with pytest.raises(UserError, match=reason):
            of(**wrong)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"pretrained": "nowhere"}, "there is no model at nowhere"),
        ({"max_length": 2048}, "has no argument 'max_length'"),
        ({"learn": "maybe"}, "learn is 'maybe'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"prefix_token_id": 257}, "prefix_token_id is 257; the model knows ids 0 to 256"),
    ],
)
def test_wrong_arguments_are_refused(directory: Path, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        harness_model(directory, **arguments)


def test_arguments_of_the_command_line(directory: Path) -> None:
    from longread.lm_eval import LongreadLM

    made = LongreadLM.create_from_arg_string(
        f"pretrained={directory},learn=false,dtype=float32", {"batch_size": "auto:4", "device": "cuda:0"}
    )
    assert not made.learn
    assert made.batch_size == 8
    assert made.get_model_info()["model_dtype"] == "torch.float32"
    assert harness_model(directory).learn
    assert made.tok_encode("a") == [256, 97]
    assert made.tok_encode("a", add_special_tokens=False) == [97]
    assert made.eot_token_id == made.prefix_token_id == 256


def test_the_harness_finds_it() -> None:
    from lm_eval.api.registry import get_model, model_registry

    from longread.lm_eval import LongreadLM

    assert get_model("longread") is LongreadLM
    assert "hf" in model_registry  # the harness's own are still there
    groups = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups == {"lm_eval.models": {"longread": f"{LongreadLM.__module__}:{LongreadLM.__name__}"}}


def test_without_the_harness_it_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from longread.lm_eval.adapter import harness_class

    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    with pytest.raises(UserError, match="run pip install lm_eval"):
        harness_class.__wrapped__()


def write_task(directory: Path) -> dict[str, Any]:
    """A local task: bits per byte of whole documents."""
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (directory / "documents.jsonl").write_text("\n".join(lines))
    return {
        "task": "reading",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "documents.jsonl")}, "cache_dir": str(directory)},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    }


def bits_per_byte(opened: OpenModel, learn: bool) -> float:
    sums = [-opened.session(learn=learn).read(text).double().sum().item() for text in DOCUMENTS]
    return -(sum(sums) / sum(len(text.encode()) for text in DOCUMENTS)) / math.log(2)


def reported(table: str) -> float:
    """What the harness prints, with four places."""
    (row,) = [line for line in table.splitlines() if "|bits_per_byte|" in line]
    return float(row.split("|")[7])


@pytest.mark.parametrize("learn", [True, False])
def test_the_harness_reports_what_direct_scoring_gives(
    directory: Path, opened: OpenModel, tmp_path: Path, learn: bool
) -> None:
    import lm_eval
    import lm_eval.tasks

    import longread.lm_eval

    assert longread.lm_eval
    reading = write_task(tmp_path)
    choosing = reading | {
        "task": "choosing",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["A", "B", "C"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    found = lm_eval.simple_evaluate(
        model="longread",
        model_args={"pretrained": str(directory), "learn": learn},
        tasks=[reading, choosing],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        bootstrap_iters=0,
        device="cpu",
    )
    assert found["results"]["reading"]["bits_per_byte,none"] == bits_per_byte(opened, learn)
    assert found["config"]["learn"] is learn
    right = 0
    for text in DOCUMENTS:
        scores = [
            directly(
                opened, [256, *text.rstrip().encode()], [*text[len(text.rstrip()) :].encode(), *f" {x}".encode()], learn
            )
            for x in "ABC"
        ]
        right += scores.index(max(scores)) == 1
    assert found["results"]["choosing"]["acc,none"] == right / len(DOCUMENTS)


def test_the_command_line(
    directory: Path,
    opened: OpenModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import functools

    import lm_eval.tasks

    from longread.lm_eval import main

    # the harness's own list of ten thousand tasks takes 13 s to read
    quick = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)
    (tmp_path / "reading.yaml").write_text(json.dumps(write_task(tmp_path)))
    options = ["--tasks", str(tmp_path / "reading.yaml"), "--model", "longread", "--model_args"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *options, f"pretrained={directory},learn=true"])
    assert main() == 0
    assert reported(capsys.readouterr().out) == pytest.approx(bits_per_byte(opened, learn=True), abs=1e-3)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *options, "pretrained=nowhere"])
    assert main() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("longread.lm_eval: error: ")]
    assert "there is no model at nowhere" in line


@pytest.mark.slow
def test_the_command_line_as_a_process(directory: Path, opened: OpenModel, tmp_path: Path) -> None:
    (tmp_path / "reading.yaml").write_text(json.dumps(write_task(tmp_path)))
    command = [sys.executable, "-m", "longread.lm_eval", "--model", "longread"]
    command += ["--model_args", f"pretrained={directory},learn=true", "--tasks", str(tmp_path / "reading.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert reported(done.stdout) == pytest.approx(bits_per_byte(opened, learn=True), abs=1e-3)


CHAT = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


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
    from longread.lm_eval.writing import Writing, _Answer

    answer = _Answer(model._prompts, (1, 2), Writing(9, 0.0, 1.0, None, 1.0, ()), 0, 16)
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


def test_a_converted_model_has_the_scores_of_its_source(tmp_path: Path) -> None:
    """Against the harness's own model "hf": frozen, and shorter than the window, both are the same network."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from tests import pretrained_models

    source = pretrained_models.make("llama")
    pretrained_models.save(source, tmp_path / "source")
    pretrained_models.converted(tmp_path / "source", tmp_path / "reader", "--window", "64", "--mini-batch", "16")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pretrained_models.tokenizer(), eos_token="~", pad_token="~")
    theirs = HFLM(pretrained=source, tokenizer=tokenizer, device="cpu", max_length=256)
    ours = harness_model(tmp_path / "reader", prefix_token_id=tokenizer.eos_token_id)
    pairs = asked([("the lamp and the", " keeper"), ("a lamp ", "burns"), ("", "lamp")])
    expected = [score for score, _ in theirs.loglikelihood(pairs, disable_tqdm=True)]
    assert [score for score, _ in ours.loglikelihood(pairs, disable_tqdm=True)] == pytest.approx(expected, rel=1e-5)
    document = asked([("the keeper trims the lamp",)])
    expected = theirs.loglikelihood_rolling(document, disable_tqdm=True)
    assert ours.loglikelihood_rolling(document, disable_tqdm=True) == pytest.approx(expected, rel=1e-5)
    wish = asked([("the lamp", {"until": ["q"], "max_gen_toks": 20, "do_sample": False})])
    assert ours.generate_until(wish, disable_tqdm=True) == theirs.generate_until(wish, disable_tqdm=True)
