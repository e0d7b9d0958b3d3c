"""Speculative decoding by position: a drafter that learns beside the same one read frozen, and the verifier alone.

    python -m benchmarks.speculative runs/full runs/e2e --data runs/data/validation [--out benchmarks/results]

First the gate: the tests of the decision rule, and on these two models the greedy text of the pair against that of the
verifier alone. Then all readers go through held-out documents. At each position they

- write `--tokens` tokens on forks: how many guesses of a round are accepted, how many tokens there are a second;
- look at the next `--ahead` tokens of the document itself: the overlap Σ min(p, q), which is the chance that one guess
  is accepted, for every token with the same text before it. It varies less than what is written.

Intervals are over documents, 95 %. Prints the tables and writes them, with all settings, to a dated file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import torch

from longread.config import UserError
from longread.data import TokenDataset
from longread.evaluate.estimate import Estimate, ratio
from longread.inner_loop import Decoder
from longread.loading import OpenModel, open_model
from longread.record import hardware
from longread.session import Session
from longread.speculative import Speculation

READINGS = ("learning", "frozen")
GATE_PROMPTS, GATE_TOKENS, NEAR_TIE = 4, 32, 0.05


@dataclass
class Found:
    """Sums at one position, one number for each document."""

    accepted: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    drafted: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    rounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    overlap: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    ahead: list[float] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verifier", help="a model that does not learn: full attention, say")
    parser.add_argument("drafter", help="a model that learns while it reads")
    parser.add_argument("--data", required=True, help="prepared token shards, held out")
    parser.add_argument("--positions", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--ahead", type=int, default=128)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--skip-tests", action="store_true", help="of the gate, only compare greedy texts")
    parser.add_argument("--out", type=Path, help="write the page and the figures into this folder")
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except UserError as error:
        print(f"speculative: error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Gate, measurement, page."""
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    verifier, drafter = (open_model(path, options.device) for path in (options.verifier, options.drafter))
    if verifier.tokenizer.fingerprint != drafter.tokenizer.fingerprint:
        raise UserError("the two models have different tokenizers; give two models with one")
    texts = list(documents(options, TokenDataset.open(Path(options.data)), verifier))
    verdict = gate(verifier, drafter, [text for _, text in texts], skip_tests=options.skip_tests)
    print(verdict, file=sys.stderr)
    found = {position: Found() for position in options.positions}
    for name, text in texts:
        print(f"{name}: {len(text):,} tokens", file=sys.stderr)
        measure(options, verifier, drafter, text, found)
    rows = [row(position, found[position]) for position in options.positions if found[position].ahead]
    page = render(options, verdict, rows, len(texts))
    print(page)
    if options.out:
        gpu = verifier.model.device.type == "cuda"
        device = torch.cuda.get_device_name().split()[-1].lower() if gpu else f"cpu-{torch.get_num_threads()}-threads"
        stem = options.out / f"speculative_{device}_{date.today()}"
        stem.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
        stem.with_suffix(".json").write_text(json.dumps(as_json(options, verdict, rows), indent=2) + "\n")
    if options.json:
        options.json.write_text(json.dumps(as_json(options, verdict, rows), indent=2) + "\n", encoding="utf-8")
    return 0


def documents(options: argparse.Namespace, data: TokenDataset, opened: OpenModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The longest documents, each cut after what is read of it."""
    if data.tokenizer_fingerprint != opened.tokenizer.fingerprint:
        raise UserError(f"{options.data} was prepared with another tokenizer than that of the models; prepare it anew")
    longest = max(options.positions) + options.ahead
    lengths = [min(len(data.document(i)), longest) for i in range(data.num_documents)]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in order[: options.documents]:
        yield f"document {i}", torch.from_numpy(data.document(i)[:longest].astype(np.int64))


def gate(verifier: OpenModel, drafter: OpenModel, texts: list[torch.Tensor], *, skip_tests: bool) -> str:
    """What was checked; exits if something is wrong."""
    if not skip_tests:
        chosen = ["tests/test_speculative.py", "-k", "exactly or both_have_read", "-m", "not gpu and not slow"]
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *chosen], check=False, capture_output=True)
        if tests.returncode:
            sys.exit(f"no speed on red: {tests.stdout.decode()[-2000:]}")
    ties = 0
    for i in range(GATE_PROMPTS):
        prompt = texts[i % len(texts)][: 64 + 37 * i]
        alone = Session(verifier.model, verifier.inner, learn=False)
        alone.read(prompt)
        pair = Speculation(alone.fork(), Session(drafter.model, drafter.inner))
        pair.drafter.read(prompt)
        for token in pair.generate(GATE_TOKENS, temperature=0):
            logits = verifier.model.logits(alone.state.output)[0]
            if token != int(logits.argmax()):
                gap = ((logits.max() - logits[token]) / logits.std()).item()
                if gap > NEAR_TIE:
                    sys.exit(f"no speed on red: a greedy token is {gap:.2g} deviations below the verifier's likeliest")
                ties += 1
            alone.read([token])
    said = f"{GATE_PROMPTS} greedy texts of {GATE_TOKENS} tokens are those of the verifier alone"
    said += f", but for {ties} near ties that another order of sums decides" if ties else ""
    return said + ("" if skip_tests else "; the tests of the decision rule and of what both have read pass")


def measure(
    options: argparse.Namespace, verifier: OpenModel, drafter: OpenModel, text: torch.Tensor, found: dict[int, Found]
) -> None:
    """One document, by all readers, with a stop at each position."""
    judge = Session(verifier.model, verifier.inner, learn=False)
    guessers = {reading: Session(drafter.model, drafter.inner, learn=reading == "learning") for reading in READINGS}
    readers = [judge, *guessers.values()]
    for position in sorted(options.positions):
        if position + options.ahead > len(text):
            return
        for reader in readers:
            reader.read(text[reader.position : position])
        at = found[position]
        p = likely(judge, text[position : position + options.ahead])
        at.ahead.append(float(len(p)))
        for reading, guesser in guessers.items():
            at.overlap[reading].append(overlap(p, guesser, text[position : position + options.ahead]))
        for name in ("alone", *READINGS):
            writer = judge.fork() if name == "alone" else Speculation(
                judge.fork(), guessers[name].fork(), draft_tokens=options.draft_tokens
            )  # fmt: skip
            synchronize(judge)
            started = time.perf_counter()
            written = list(writer.generate(options.tokens, temperature=options.temperature, seed=position))
            synchronize(judge)
            at.seconds[name].append(time.perf_counter() - started)
            at.tokens[name].append(float(len(written)))
            if isinstance(writer, Speculation):
                full = [x for x in writer.rounds if x.drafted == options.draft_tokens]  # the last may be cut short
                at.rounds[name].append(float(len(full)))
                at.accepted[name].append(float(sum(x.accepted for x in full)))
                at.drafted[name].append(float(sum(min(x.accepted + 1, x.drafted) for x in full)))


def likely(reader: Session, tokens: torch.Tensor) -> torch.Tensor:
    """What a reader expects in the place of each token, [n, V], while it reads them on a fork."""
    decoder = Decoder(reader.model, reader.state, reader.inner, learn=reader.learn)
    rows = []
    for token in tokens.to(reader.model.device):
        rows.append(decoder.logits()[0].softmax(-1))
        decoder.read(token.unsqueeze(0))
    return torch.stack(rows)


def overlap(p: torch.Tensor, guesser: Session, tokens: torch.Tensor) -> float:
    """Sum over the tokens of the chance that a guess in their place is accepted."""
    return torch.minimum(p, likely(guesser, tokens)).sum().item()


def synchronize(reader: Session) -> None:
    if reader.model.device.type == "cuda":
        torch.cuda.synchronize()


def row(position: int, found: Found) -> dict[str, object]:
    """The figures of one position."""

    def estimate(amounts: list[float], sizes: list[float]) -> Estimate | None:
        return ratio(np.array(amounts), np.array(sizes))

    entry: dict[str, object] = {"position": position, "documents": len(found.ahead)}
    for reading in READINGS:
        entry[f"accepted_{reading}"] = estimate(found.accepted[reading], found.rounds[reading])
        entry[f"chance_{reading}"] = estimate(found.accepted[reading], found.drafted[reading])
        entry[f"overlap_{reading}"] = estimate(found.overlap[reading], found.ahead)
    gained = [a - b for a, b in zip(found.overlap["learning"], found.overlap["frozen"], strict=True)]
    entry["overlap_gained"] = estimate(gained, found.ahead)
    for name in ("alone", *READINGS):
        entry[f"tokens_per_second_{name}"] = sum(found.tokens[name]) / sum(found.seconds[name])
    return entry


def render(options: argparse.Namespace, verdict: str, rows: list[dict[str, object]], count: int) -> str:
    """The page."""
    about = (
        f"`{Path(options.verifier).name}` verifies, `{Path(options.drafter).name}` drafts {options.draft_tokens} "
        f"tokens a round, temperature {options.temperature:g}. {count} held-out documents; after each position "
        f"{options.tokens} tokens are written and {options.ahead} of the document looked at. "
        f"{json.dumps(hardware())}; torch {torch.__version__}."
    )
    columns = ["position", "documents", "accepted a round, learning", "frozen", "overlap, learning", "frozen"]
    columns += ["gained by learning", "tokens/s alone", "learning", "frozen"]
    lines = [f"# Speculative decoding by position, {date.today()}", "", about, "", f"Gate: {verdict}.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "--:|" * len(columns)]
    for entry in rows:
        names = [f"{kind}_{reading}" for kind in ("accepted", "overlap") for reading in READINGS] + ["overlap_gained"]
        speeds = [f"{entry[f'tokens_per_second_{name}']:.0f}" for name in ("alone", *READINGS)]
        cells = [f"{entry['position']:,}", str(entry["documents"]), *(str(entry[name]) for name in names), *speeds]
        lines.append("| " + " | ".join(cells) + " |")
    legend = (
        "Accepted a round: of the guesses of one pass of the verifier; one more token is written with them. "
        "Overlap: the mean of Σ min(p, q) over the tokens of the document itself."
    )
    lines += ["", legend]
    return "\n".join(lines)


def as_json(options: argparse.Namespace, verdict: str, rows: list[dict[str, object]]) -> dict[str, object]:
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "json", "skip_tests")}
    settings |= {name: Path(settings[name]).name for name in ("verifier", "drafter", "data")}
    plain = [{k: vars_of(v) for k, v in entry.items()} for entry in rows]
    return {"settings": settings, "gate": verdict, "hardware": hardware(), "torch": torch.__version__, "rows": plain}


def vars_of(value: object) -> object:
    if isinstance(value, Estimate):
        return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}
    return value


if __name__ == "__main__":
    sys.exit(main())
