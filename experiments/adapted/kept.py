"""A memory beyond the window at constant cost: the adapted reader, as it is, with tokens that are kept.

Nothing is trained. Needles are asked for with a few sizes of the memory, and in two other ways of choosing what is
kept, which tell why one is not found: by chance, and by an oracle that keeps each needle, whatever it cost. The same
prompts for all, those of `recall` too.

    python -m experiments.adapted.kept save RUN OUT --tokens 256 --run 48
    python -m experiments.adapted.kept ask MODEL --haystack BOOKS --contexts 4096 --longest 32768 --json OUT
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.adapted import answers, recall
from experiments.adapted.plan import BESIDE, BOOKS, UNIT, Plan
from experiments.plan import Command

if TYPE_CHECKING:
    from longread.evaluate import Sample
    from longread.inner_loop import ReadingState
    from longread.loading import OpenModel

CONTEXTS, FEW, FAR = (2, 4, 8, 16, 32), (4, 16), (128,)
"""In units; all beyond the window. The last is 16 times as long as what the reader was adapted on."""
READ_PER_SECOND = {"learning": 40e3, "frozen": 120e3}
"""Tokens, without CUDA graphs. A guess."""
GIBIBYTES, BOOK_UNITS = 40, 32
NEEDLES, CHANCE = "needle", "chance"
READINGS = ("learning", "frozen")
QUESTIONS = "questions-kept"
"""Questions about books, asked as those of `answers` are, with the base beside."""


class Arm(NamedTuple):
    """A memory: how many tokens, in runs of how many, as shares of 1024; how they are chosen, and what is asked."""

    name: str
    tier: int
    tokens: int
    run: int
    contexts: Sequence[int] = FEW
    chosen: str = ""
    """Empty: by surprise."""
    variants: Sequence[int] = recall.VARIANTS
    readings: Sequence[str] = READINGS
    reads_books: bool = True


ARMS = (
    Arm("kept-1024", 1, 1024, 48, CONTEXTS),
    Arm("kept-1024-far", 1, 1024, 48, FAR, "", (2, 3), READINGS[:1], False),
    Arm("kept-4096-far", 1, 4096, 48, FAR, "", (2, 3), READINGS[:1], False),
    Arm("kept-none-far", 1, 0, 48, FAR, "", (2, 3), READINGS[:1], False),
    Arm("kept-256", 1, 256, 48, CONTEXTS),
    Arm("kept-4096", 1, 4096, 48, (16, 32), "", (2, 3), READINGS[:1]),
    Arm("kept-first", 1, 48, 48, (4,)),
    Arm("kept-256-needle", 1, 256, 48, FEW, NEEDLES, reads_books=False),
    Arm("kept-256-chance", 2, 256, 48, FEW, CHANCE),
    Arm("kept-128", 3, 128, 48, FEW),
)
"""One keeps the first tokens of all alone: what a pretrained model leans on, and nothing of what it has read."""


def jobs(plan: Plan) -> None:
    """Each arm is a model of its own with the weights of "first-order"."""
    base = plan.run_of("first-order")
    for arm in ARMS:
        model, result = plan.run_of(arm.name), plan.result_of(arm.name, "question")
        tokens, run = (-(-size * plan.unit // UNIT) for size in (arm.tokens, arm.run))
        save = ("-m", __name__, "save", str(base), str(model), "--tokens", str(tokens), "--run", str(run))
        commands = [Command(save, model / "config.json")]
        if arm.reads_books and not arm.chosen:
            commands += [plan.evaluation(arm.name, BOOK_UNITS), plan.size(arm.name)]
        contexts, longest = (
            sorted({max(recall.SHORTEST, plan.shown(units) * plan.unit) for units in given})
            for given in (arm.contexts, (*CONTEXTS, *arm.contexts))
        )
        ask = ["-m", __name__, "ask", str(model), "--haystack", str(plan.data / "books"), "--contexts"]
        ask += [*map(str, contexts), "--longest", str(longest[-1]), "--json", str(result)]
        ask += ["--variants", *map(str, arm.variants), "--readings", *arm.readings]
        commands.append(Command((*ask, *(["--choose", arm.chosen] if arm.chosen else [])), result))
        prompts = recall.PER_DEPTH * len(recall.DEPTHS) * len(arm.variants)
        asked = sum(arm.contexts) * prompts + arm.reads_books * BOOKS * BOOK_UNITS
        seconds = recall.START + asked * UNIT * sum(1 / READ_PER_SECOND[reading] for reading in arm.readings)
        plan.job(
            arm.name,
            arm.tier,
            commands,
            ("first-order",),
            seconds=min(290.0, BESIDE * seconds),
            gibibytes=GIBIBYTES,
            experiment="kept",
        )
    models = [str(plan.run_of(name)) for name in ("kept-1024", "first-order")]
    texts, wanted = [str(plan.work / "stretches" / "texts")], [("questions", models, answers.CONTEXTS, answers.ROWS)]
    answers.ask(plan, QUESTIONS, 1, texts, wanted, ("kept-1024", "stretches"), seconds=90)


def main(arguments: list[str] | None = None) -> int:
    """Makes a model that keeps tokens, or asks one for needles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    saving = commands.add_parser("save")
    saving.add_argument("source", type=Path)
    saving.add_argument("out", type=Path)
    saving.add_argument("--tokens", type=int, required=True)
    saving.add_argument("--run", type=int, required=True)
    asking = commands.add_parser("ask")
    asking.add_argument("model", type=Path)
    asking.add_argument("--haystack", type=Path, required=True)
    asking.add_argument("--contexts", type=int, nargs="+", required=True)
    asking.add_argument("--variants", type=int, nargs="+", choices=recall.VARIANTS, default=recall.VARIANTS)
    asking.add_argument("--readings", nargs="+", choices=READINGS, default=READINGS)
    asking.add_argument("--longest", type=int, required=True, help="for which the haystack is made")
    asking.add_argument("--choose", choices=(NEEDLES, CHANCE), help="default: by surprise")
    asking.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.what == "save":
        save(options.source, options.out, options.tokens, options.run)
    else:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(ask(options)), encoding="utf-8")
    return 0


def save(source: Path, out: Path, tokens: int, run: int) -> None:
    """The model of `source`, which keeps so many tokens."""
    from longread.checkpoint import find_tokenizer, load_model, save_model
    from longread.loading import open_model
    from longread.train.beginning import copy_tokenizer

    opened, metadata = open_model(source, "cpu").keeping(tokens, run=run), load_model(source).metadata
    if (tokenizer := find_tokenizer(source)) is not None:
        out.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(tokenizer.parent, out)
    fingerprint = metadata.get("tokenizer_fingerprint")
    save_model(out, opened.model, opened.inner, fingerprint, opened.provenance, learns=opened.learns)


def ask(options: argparse.Namespace) -> dict[str, Any]:
    """What `longread needle` leaves."""
    from longread.data import read_texts
    from longread.evaluate import VARIANTS, Needles, essays, make_samples, noise, search
    from longread.loading import open_model

    opened = open_model(options.model)
    hay = {"noise": noise(opened.tokenizer, options.longest)}
    hay["essay"] = essays(read_texts([str(options.haystack)]), opened.tokenizer, options.longest)
    samples = [
        sample
        for number in options.variants
        for context in options.contexts
        for sample in make_samples(
            opened.tokenizer,
            VARIANTS[number],
            hay[VARIANTS[number].haystack],
            context,
            recall.DEPTHS,
            recall.PER_DEPTH,
            seed=0,
        )
    ]
    searches = []
    for learn in (True, False) if opened.learns else (False,):
        if READINGS[not learn] not in options.readings:
            continue
        begun = _reader(opened, learn, options.choose) if options.choose else None
        searches.append(
            search(
                options.model.name,
                opened.model,
                opened.inner,
                opened.tokenizer,
                samples,
                learn=learn,
                batch_size=recall.SIDE_BY_SIDE,
                max_tokens=recall.ANSWER_TOKENS,
                begun=begun,
            )
        )
    return Needles(searches).as_json()


def _reader(opened: OpenModel, learn: bool, choose: str) -> Callable[[Sequence[Sample]], ReadingState]:
    return lambda samples: read_choosing(opened, samples, learn=learn, choose=choose)


def read_choosing(opened: OpenModel, samples: Sequence[Sample], *, learn: bool, choose: str) -> ReadingState:
    """Reads all whole mini-batches of the prompts, of equal length, but the last tokens.

    What is kept is chosen as if tokens had cost something else: those of the needle (`NEEDLES`) as much as the first
    of all, or all a number drawn between 0 and 1 (`CHANCE`). The first of all stays what it is.
    """
    import torch

    from longread.inner_loop import begin, read
    from longread.inner_loop.kept import FIRST

    model = opened.model
    M, device = model.config.mini_batch_size, model.device
    if model.config.window_size % M:
        raise ValueError("the window is no multiple of the mini-batch: it would be decided amid one, by its real costs")
    prompts = torch.tensor([sample.tokens.tolist() for sample in samples], device=device)
    starts, ends = (
        torch.tensor([getattr(s, n) for s in samples], device=device) for n in ("needle_start", "needle_end")
    )
    draw = torch.Generator().manual_seed(0)
    state = begin(model, len(samples))
    for first in range(0, prompts.shape[1] - 1 - M, M):
        state = read(model, state, prompts[:, first : first + M], inner=opened.inner, learn=learn).state
        kept = state.kept
        if kept is None:
            raise ValueError("the model keeps nothing; there is nothing to choose")
        at, cost = torch.arange(first, first + M, device=device), kept.nll[:, -M:]
        if choose == NEEDLES:
            inside = (at >= starts[:, None]) & (at < ends[:, None])
            cost = cost.masked_fill(inside, FIRST)
        else:
            drawn = torch.rand(cost.shape, generator=draw).to(cost)
            cost = torch.where(at == 0, cost, drawn)
        nll = torch.cat((kept.nll[:, :-M], cost), dim=1)
        state = dataclasses.replace(state, kept=kept._replace(nll=nll))
    return state


if __name__ == "__main__":
    sys.exit(main())
