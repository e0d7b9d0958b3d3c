"""docs/pretrained.md, followed from top to bottom on tiny models that have the names of the page's large ones.

Commands of this library and the blocks of Python run as they stand, but for what makes training short. Commands of
other programs are checked for their form.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import zarr
from transformers import PreTrainedModel

import longread.lm_eval
from longread import recipes
from longread.checkpoint.model import CONFIG_FILE, described
from longread.cli import build_parser, main
from longread.config import InnerConfig, ModelConfig
from longread.files import write_json
from longread.pretrained.hub import find_cached
from longread.tokenizer import train_bpe
from tests import gguf_files, official_trees
from tests.pretrained_models import make
from tests.test_docs import ROOT, blocks, shown_after
from tests.test_pretrained_gguf import TOKENS_OF_BYTES

PAGE = ROOT / "docs" / "pretrained.md"
EXPERIMENT = ROOT / "experiments" / "2026-11-29_pretrained" / "README.md"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M"
TEXT = " ".join(f"Keeper {i} trims lamp {i * i % 101}, and the night waits with him." for i in range(80))
SMOLLM2 = ModelConfig(
    vocab_size=49152,
    width=576,
    num_blocks=30,
    num_heads=9,
    kv_heads=3,
    mlp_hidden=1536,
    window_size=1024,
    mini_batch_size=256,
    num_suffix_blocks=8,
    post_norm=False,
    qk_norm=False,
)
"""What `longread convert` makes of it; weights are not needed to estimate."""
QWEN3: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {"width": 1024, "num_blocks": 28, "num_heads": 16, "mlp_hidden": 3072, "head_size": 128},
    "Qwen3-1.7B": {"width": 2048, "num_blocks": 28, "num_heads": 16, "mlp_hidden": 6144},
    "Qwen3-4B": {"width": 2560, "num_blocks": 36, "num_heads": 32, "mlp_hidden": 9728, "head_size": 128},
}


def pretrained(vocab_size: int) -> PreTrainedModel:
    """As deep as what the page cuts from it needs."""
    sizes = {"num_hidden_layers": 16, "hidden_size": 32, "intermediate_size": 192, "max_position_embeddings": 8192}
    return make("llama", vocab_size=vocab_size, num_attention_heads=2, num_key_value_heads=1, **sizes)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with all that the page takes for granted: texts, a model in the Hub's cache, a GGUF, what the authors
    of the paper publish."""
    if torch.cuda.is_available():
        pytest.skip("tiny models are for CPUs")
    (tmp_path / "books").mkdir()
    for i in range(6):
        (tmp_path / "books" / f"{i}.txt").write_text(TEXT[i:])
    (tmp_path / "book.txt").write_text(TEXT)
    tokenizer = train_bpe([TEXT], 300)
    cached = tmp_path / "cache" / f"models--{HUB_NAME.replace('/', '--')}"
    model = cached / "snapshots" / "1a2b3c"
    pretrained(304).save_pretrained(model)  # more than the tokenizer has tokens, as is usual
    tokenizer.save(model)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1a2b3c")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    gguf_files.write(pretrained(258), tmp_path / "SmolLM2-135M.gguf", TOKENS_OF_BYTES, kind="Q8_0")
    official(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def official(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint as the official code saves it, of a size that is called 125m here, and its tokens."""
    tokenizer = train_bpe([TEXT], 300)
    (directory / "llama3").mkdir()
    tokenizer.save(directory / "llama3")
    monkeypatch.setitem(recipes.SIZES, "125m", official_trees.size())
    weights = official_trees.tree(official_trees.drawn(vocab_size=300))
    with ocp.CheckpointManager(directory / "checkpoints" / "125m_ttt_e2e") as manager:
        item = ocp.args.StandardSave(weights)
        manager.save(10, args=ocp.args.Composite(model_weights=item), force=True)
    group = zarr.open_group(str(directory / "dclm"), mode="w")
    for name in ("train", "val"):
        tokens = np.array([tokenizer.bos_id, *tokenizer.encode(TEXT)] * 8, dtype=np.uint16)
        group.create_array(name, data=tokens, chunks=(1000,))


def tasks_of_the_harness(names: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks by names that the harness has, over one document: its own would have to be downloaded."""
    (directory / "documents.jsonl").write_text(json.dumps({"text": TEXT[:2000]}))
    for name in names:
        assert list(Path(lm_eval.tasks.__file__).parent.glob(f"{name}/{name}.yaml")), f"the harness has no {name}"
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(directory / "documents.jsonl")},
                "cache_dir": str(directory / "json"),
            },
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        }
        (directory / "tasks").mkdir(exist_ok=True)
        (directory / "tasks" / f"{name}.yaml").write_text(json.dumps(task))
    manager = lm_eval.tasks.TaskManager

    def quick(*_: Any, **__: Any) -> Any:
        return manager(include_defaults=False, include_path=str(directory / "tasks"))

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)


def shortened(words: list[str]) -> list[str]:
    """Training for a moment, short answers, short documents, and a validation set from a handful of books."""
    less = {"generate": ["--max-tokens", "20"], "evaluate": ["--max-tokens", "1100"]}
    if "--validation-fraction" in words:
        less["prepare"] = ["--validation-fraction", "0.5"]
    if words[0] != "train":
        return [*words, *less.get(words[0], [])]
    words = [*words, "--context-length", "512", "--batch-size", "1", "--set", "evaluate_every=none"]
    if "--tokens" in words:
        words[words.index("--tokens") + 1] = "512"
        return words
    return [*words, "--steps", "1"]


class Walk:
    """Does what the blocks of the page say, one after the other."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._home, self._patch, self._capsys = home, monkeypatch, capsys
        self._names: dict[str, Any] = {}
        self.said: dict[str, str] = {}
        """What each command of ours has printed."""

    def python(self, block: str) -> None:
        exec(compile(block, PAGE.name, "exec"), self._names)

    def bash(self, block: str) -> None:
        for line in block.splitlines():
            words = shlex.split(line)
            ways: dict[str, Callable[[list[str]], None]] = {
                "longread": self._ours,
                "hf": self._hub,
                "python": self._harness,
            }
            ways[words[0]](words[1:])
            self.said[line] = self._capsys.readouterr().out

    def _ours(self, words: list[str]) -> None:
        if words[0] == "serve":  # until it is stopped: form only
            build_parser().parse_args(words)
        else:
            assert main(shortened(words)) == 0, f"longread {shlex.join(words)}: {self._capsys.readouterr().err}"

    def _hub(self, words: list[str]) -> None:
        """Form only."""
        assert words[0] == "download"
        assert find_cached(words[1]).directory.is_dir()

    def _harness(self, words: list[str]) -> None:
        assert words[:2] == ["-m", "longread.lm_eval"]
        with self._patch.context() as patch:
            tasks_of_the_harness(words[words.index("--tasks") + 1].split(","), self._home, patch)
            patch.setattr("sys.argv", words[1:])
            assert longread.lm_eval.main() == 0


def page_blocks() -> list[tuple[str, str]]:
    """Language and text of every block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_page_can_be_followed(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    walk = Walk(home, monkeypatch, capsys)
    for language, block in page_blocks():
        if language != "text":
            getattr(walk, language)(block)
    said = walk.said
    assert len(said) > 25
    (converted,) = (what for line, what in said.items() if line.startswith("longread convert") and "deep" in line)
    assert "the last 15 of 16 blocks can learn every 256 tokens" in converted
    (compared,) = (what for line, what in said.items() if "--full" in line)
    rows = re.findall(r"^│ (.+?) +│ +[\d,]+ │", compared, flags=re.MULTILINE)
    assert rows == [
        "smollm2, frozen",
        *("reader, learning", "reader, frozen", "exact, learning", "exact, frozen"),
        *("swa", "full", "smollm2, full attention, frozen"),
    ]
    learning, frozen = (
        re.findall(r"\|bits_per_byte\|.*?\|([\d.]+)\|", what)[0] for line, what in said.items() if "lm_eval" in line
    )
    assert learning != frozen


def described_model(directory: Path, config: ModelConfig) -> None:
    """A model without weights."""
    directory.mkdir()
    write_json(directory / CONFIG_FILE, described(config, InnerConfig(), "", None, None, learns=True), kind="model")


@pytest.mark.parametrize("block", [b for b in blocks(PAGE, "bash") if shown_after(PAGE, b)])
def test_it_shows_what_is_estimated(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    described_model(tmp_path / "smollm2", SMOLLM2)
    assert main(shlex.split(block)[1:]) == 0
    assert capsys.readouterr().out == shown_after(PAGE, block)


def table(page: Path, *columns: str) -> dict[str, dict[str, str]]:
    """Rows by their first cell, of all tables of a page that have these columns."""
    found: dict[str, dict[str, str]] = {}
    for text in re.findall(r"(?:^\|.*\n)+", page.read_text(), flags=re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines())
        if set(columns) <= set(head):
            for name, *cells in rows:
                found.setdefault(name, dict(zip(head[1:], cells, strict=True)))
    return found


def test_its_figures_are_those_of_the_experiment() -> None:
    shown = table(PAGE, "1–2K", "seconds")
    losses, speeds = table(EXPERIMENT, "1–2K", "trained on"), table(EXPERIMENT, "seconds")
    assert len(shown) == 11
    for name, row in shown.items():
        expected = losses[name]
        assert {place: row[place] for place in row if place[0].isdigit()} == {
            place: expected[place] for place in row if place[0].isdigit()
        }, name
        assert row["tokens"] == expected["trained on"]
        trained = speeds.get(re.sub(", (learning|frozen)$", "", name), {"seconds": "–"})
        assert row["seconds"] == trained["seconds"], name


def test_its_table_of_memory_is_what_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = table(PAGE, "the whole network")
    assert shown.keys() == QWEN3.keys()
    common = {"vocab_size": 151936, "kv_heads": 8, "window_size": 1024, "mini_batch_size": 256, "post_norm": False}
    for name, sizes in QWEN3.items():
        config = ModelConfig(num_suffix_blocks=sizes["num_blocks"] // 4, **common, **sizes)
        described_model(tmp_path / name, config)
        wanted = [f"{config.num_parameters / 1e6:,.0f}M"]
        for more in ([], ["--only", "suffix"]):
            dials = ["--train", "1", "--precision", "bfloat16", "--memory", "80", "--context-length", "8192"]
            assert main(["estimate", name, *dials, *more, "--quiet", "--json", "found.json", "--force"]) == 0
            _, *steps, first = json.loads(Path("found.json").read_text())["rows"]
            sizes_of = {row["what"].rpartition(" ")[2]: f"{row['bytes'] / 2**30:.0f} GiB" for row in steps}
            if first["schedule"] is None:
                wanted.append(f"does not fit: {sizes_of['sqrt']} (`sqrt`)")
            elif first["schedule"] == "none":
                wanted.append(sizes_of["none"])
            else:
                wanted.append(f"{sizes_of[first['schedule']]} (`{first['schedule']}`)")
        assert list(shown[name].values()) == wanted, name


def test_the_model_that_is_estimated_is_that_of_the_page() -> None:
    assert f"{SMOLLM2.num_parameters / 1e6:.1f} million" in PAGE.read_text()
