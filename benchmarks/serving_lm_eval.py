"""lm-eval against `longread serve`: loglikelihoods over HTTP beside direct scoring, document by document.

    python -m benchmarks.serving_lm_eval --lm-eval /path/to/python [--model runs/toy] [--documents 40]

The harness is not among Longread's test requirements, so it runs in an environment of its own: the Python given must
have `lm-eval[api]`. It is used unmodified: `--model local-completions`, with the server's tokenizer, on a multiple
choice task and a perplexity-like task made here. Exits with status 1 if a score differs by more than 1e-4 nats, or an
answer to "would it be chosen greedily" differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from longread.checkpoint import load_model, save_model
from longread.inner_loop import next_token_logits
from longread.model import Transformer, initialize
from longread.recipes import toy
from longread.session import Session
from longread.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

TOLERANCE = 1e-4
TASK = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def main() -> int:
    """Runs the comparison and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", required=True, metavar="PYTHON", help="a Python that has lm-eval[api]")
    parser.add_argument("--model", help="a model or a run (default: an untrained toy)")
    parser.add_argument("--documents", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        model = Path(options.model) if options.model else untrained(home / "toy")
        write_task(home, options.documents)
        samples = harness(home, model, options.lm_eval)
        return compare(samples, model)


def untrained(directory: Path) -> Path:
    """A toy model whose weights are random, with the tokenizer of bytes."""
    config = toy()
    network = Transformer(config.model)
    initialize(network, seed=0)
    save_model(directory, network, config.inner, ByteTokenizer.fingerprint)
    ByteTokenizer().save(directory)
    return directory


def write_task(home: Path, documents: int) -> None:
    """Questions whose contexts are longer than a mini-batch, so that scores depend on what was learned."""
    rows = []
    for i in range(documents):
        facts = " ".join(f"Number {j} has the square {j * j}." for j in range(i, i + 4 + i % 40))
        choices = [str(i * i), str(i * i + 1), f"nothing but {i}"]
        rows.append({"question": f"{facts} So {i} times {i} is", "choices": choices, "answer": 0})
    (home / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "task.yaml").write_text(TASK.format(data=home / "documents.jsonl"))


def harness(home: Path, model: Path, python: str) -> list[dict[str, Any]]:
    """What lm-eval logs of each document."""
    port = 8764
    serve = [sys.executable, "-m", "longread", "serve", "--model", str(model), "--port", str(port), "--name", "served"]
    server = subprocess.Popen([*serve, "--device", "cpu"], stderr=subprocess.PIPE, text=True)
    try:
        print((server.stderr.readline() if server.stderr else "").strip())
        arguments = f"model=served,base_url=http://127.0.0.1:{port}/v1/completions,tokenizer_backend=remote"
        arguments += ",num_concurrent=4,max_length=100000"
        command = [python, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
        command += ["--tasks", "local_choice", "--include_path", str(home), "--batch_size", "4"]
        command += ["--output_path", str(home / "out"), "--log_samples"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home / "cache")}
        subprocess.run(command, check=True, env=os.environ | offline)
    finally:
        server.terminate()
        server.wait()
    (found,) = (home / "out").rglob("samples_*.jsonl")
    return [json.loads(line) for line in found.read_text().splitlines()]


def compare(samples: list[dict[str, Any]], path: Path) -> int:
    """Prints the largest difference to direct scoring."""
    loaded = load_model(path)
    tokenizer = load_tokenizer(loaded.tokenizer_path) if loaded.tokenizer_path else ByteTokenizer()
    largest, greedy, count, differ = 0.0, 0, 0, 0
    for sample in samples:
        for asked, answered in zip(sample["arguments"].values(), sample["resps"], strict=True):
            expected = directly(Session(loaded.model, loaded.inner), tokenizer, asked["arg_0"], asked["arg_1"])
            got = float(answered[0][0]), str(answered[0][1]) == "True"
            largest = max(largest, abs(got[0] - expected[0]))
            differ += got[1] != expected[1]
            greedy += expected[1]
            count += 1
    print(f"{count} scores of {len(samples)} documents, {greedy} greedy: the largest difference is {largest:.2e} nats,")
    print(f"and {differ} answers to whether the continuation is greedy differ")
    return int(largest > TOLERANCE or differ > 0)


@torch.no_grad()
def directly(session: Session, tokenizer: Tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether each of its tokens is the likeliest; no BOS, as lm-eval asks."""
    spaces = len(context) - len(context.rstrip())
    whole = tokenizer.encode(context + continuation)
    start = len(tokenizer.encode(context[: len(context) - spaces]))
    session.read(whole[:start])
    total, greedy = 0.0, True
    for token in whole[start:]:
        greedy = greedy and int(next_token_logits(session.model, session.state)[0].argmax()) == token
        total -= session.read([token]).item()
    return total, greedy


if __name__ == "__main__":
    sys.exit(main())
