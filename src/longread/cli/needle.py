"""Hide a needle in a haystack and ask for it: S-NIAH-1 to 3 of RULER (arXiv 2404.06654), made offline.

Example:
  longread needle runs/e2e runs/full --variants 1 --contexts 1024 4096 16384
  longread needle runs/e2e --variants 2 3 --haystack essays.txt --contexts 4096 --samples 20 --json needles.json
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longread.cli.arguments import (
    MOST_TOKENS,
    add_contexts,
    add_device,
    add_kept_tokens,
    add_learn,
    add_outputs,
    add_text_format,
    check_at_most,
    format_of,
    positive,
    settle_reading,
)

if TYPE_CHECKING:
    from longread.evaluate import Haystack, Sample
    from longread.tokenizer import Tokenizer

MOST_ANSWER = 2**16
MOST_PROMPT_TOKENS = 16 * MOST_TOKENS
"""2 GiB."""
DIFFERENT_TOKENIZERS = (
    "The models have different tokenizers, and a context counts each model's own tokens: the same T is another length "
    "of text for each."
)
USED_CHARACTERS = 256
"""Of one text, for each token of the longest context; the rest of a longer text is not read."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model directories, runs or checkpoints")
    parser.add_argument(
        "--variants", type=int, nargs="+", choices=(1, 2, 3), default=[1], metavar="V", help="1, 2, 3 (default 1)"
    )
    add_contexts(parser, "of a prompt")
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="D",
        help="where the needle lies, 0 (first) to 1 (last) (default 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument(
        "--probe",
        choices=("question", "verbatim"),
        default="question",
        help="how a prompt ends: the question (default), or the needle's own words up to its value",
    )
    parser.add_argument("--samples", type=positive, default=10, metavar="N", help="prompts for each depth (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default 0)")
    parser.add_argument("--haystack", nargs="+", default=[], metavar="PATH", help="texts for variants 2 and 3")
    add_text_format(parser)
    parser.add_argument("--repeat-haystack", action="store_true", help="repeat texts that are too short")
    parser.add_argument(
        "--max-tokens", type=positive, default=128, metavar="N", help="of an answer (default 128, as in RULER)"
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="B", help="prompts side by side (default 8)")
    parser.add_argument("--no-control", action="store_true", help="leave out the frozen readings")
    add_learn(parser)
    add_kept_tokens(parser)
    add_outputs(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.cli.models import table_names
    from longread.cli.outputs import check_figures, counted, listed, progress_console, show_figures, write_text
    from longread.config import UserError
    from longread.evaluate import Needles, needle_figures, search
    from longread.evaluate.needle import chart_name
    from longread.loading import open_model, open_tokenizer

    check_at_most("--contexts", max(options.contexts))
    check_at_most("--max-tokens", options.max_tokens, MOST_ANSWER)
    charts = [chart_name(f"S-NIAH-{number}") for number in options.variants]
    check_figures(options, dict.fromkeys(charts), inputs=options.haystack)
    wrong = next((depth for depth in options.depths if not 0 <= depth <= 1), None)
    if wrong is not None:
        raise UserError(f"--depths {wrong} is not between 0 (the needle first) and 1 (the needle last)")
    if not options.haystack and set(options.variants) & {2, 3}:
        raise UserError("S-NIAH-2 and 3 hide the needle in essays; name texts with --haystack, or use --variants 1")
    tokenizers = {tokenizer.fingerprint: tokenizer for tokenizer in map(open_tokenizer, options.models)}
    _check_size(options, len(tokenizers))
    prompts = _prompts(options, list(tokenizers.values()))
    searches, console = [], progress_console(options)
    for path, name in zip(options.models, table_names(options.models), strict=True):
        opened = settle_reading(options, open_model(path, options.device)._replace(name=name))
        samples = prompts[opened.tokenizer.fingerprint]
        learns = opened.learns and opened.model.config.num_suffix_blocks > 0
        for learn in (True, False) if learns and not options.no_control else (learns,):
            way = "learning" if learn else "frozen"
            with counted(console, opened.name, len(samples), f"needles, {way}") as show:
                searches.append(
                    search(
                        opened.name,
                        opened.model,
                        opened.inner,
                        opened.tokenizer,
                        samples,
                        learn=learn,
                        batch_size=options.batch_size,
                        max_tokens=options.max_tokens,
                        on_samples=show,
                    )
                )
    needles = Needles(searches, [DIFFERENT_TOKENIZERS] if len(tokenizers) > 1 else [])
    if options.json:
        write_text(options.json, json.dumps(needles.as_json(), indent=2) + "\n", private=True)  # with all answers
    title, lead = "Needle in a haystack", listed(options.models)
    lead += f", hidden in {listed(options.haystack)}." if options.haystack else "."
    show_figures(options, needle_figures(needles), title=title, lead=lead)
    return 0


def _check_size(options: argparse.Namespace, num_tokenizers: int) -> None:
    """Raises `UserError` if the prompts would not fit into memory: those of each tokenizer are all made at once."""
    from longread.config import UserError

    prompts = num_tokenizers * options.samples * len(set(options.depths)) * len(set(options.variants))
    tokens = prompts * sum(set(options.contexts))
    if tokens > MOST_PROMPT_TOKENS:
        raise UserError(
            f"--samples {options.samples} at every depth and context makes prompts of {tokens} tokens in all, more "
            f"than {MOST_PROMPT_TOKENS}; lower it, or give fewer depths or shorter contexts"
        )


def _prompts(options: argparse.Namespace, tokenizers: Sequence[Tokenizer]) -> dict[str, list[Sample]]:
    """All prompts in the tokens of each tokenizer, by its fingerprint; what is impossible is refused first."""
    from longread.evaluate import VARIANTS, check_context, make_samples

    depths, variants = sorted(set(options.depths)), [VARIANTS[number] for number in sorted(set(options.variants))]
    places = list(itertools.product(variants, sorted(set(options.contexts))))
    for tokenizer, (variant, context) in itertools.product(tokenizers, places):
        check_context(tokenizer, variant, context, depths, options.samples, options.seed, options.probe)
    prompts = {}
    for tokenizer in tokenizers:
        haystacks = _haystacks(options, tokenizer)
        prompts[tokenizer.fingerprint] = [
            sample
            for variant, context in places
            for sample in make_samples(
                tokenizer,
                variant,
                haystacks[variant.haystack],
                context,
                depths,
                options.samples,
                options.seed,
                options.probe,
            )
        ]
    return prompts


def _haystacks(options: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Haystack]:
    from longread.data import read_texts
    from longread.evaluate import essays, noise

    longest = max(options.contexts)
    haystacks = {}
    if 1 in options.variants:
        haystacks["noise"] = noise(tokenizer, longest)
    if options.haystack and set(options.variants) & {2, 3}:
        texts = read_texts(options.haystack, text_format=format_of(options), longest=USED_CHARACTERS * longest)
        haystacks["essay"] = essays(texts, tokenizer, longest, repeat=options.repeat_haystack)
    return haystacks
