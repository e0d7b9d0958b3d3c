"""Let models continue documents, and let another model judge what they wrote.

Example:
  longread judge runs/e2e runs/full --judge runs/bigger --data data/validation --context 8192
  longread judge runs/e2e --judge models/a-hugging-face-model --data books --context 4096 --json judged.json
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from longread.cli.arguments import (
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
    from longread.evaluate import Judge
    from longread.loading import OpenModel


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="the writers: model directories, runs, checkpoints")
    parser.add_argument("--judge", required=True, metavar="MODEL", help="a Longread or Hugging Face model directory")
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH", help="a data set, or texts and directories")
    add_text_format(parser)
    parser.add_argument(
        "--context", type=positive, default=2048, metavar="T", help="tokens read and written together (default 2048)"
    )
    parser.add_argument("--written", type=positive, metavar="N", help="of these (default half)")
    parser.add_argument("--documents", type=positive, default=8, metavar="N", help="continue the first N (default 8)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default 1)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--repetition-penalty", type=float, default=1.1, help="default 1.1; 1 changes nothing")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument(
        "--bins", type=positive, default=8, metavar="N", help="of positions in the prompt and behind (default 8)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="B", help="documents side by side (default 8)"
    )
    parser.add_argument("--no-control", action="store_true", help="leave out the frozen readings")
    add_learn(parser)
    add_kept_tokens(parser)
    add_outputs(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from longread.cli.documents import read_documents
    from longread.cli.models import table_names
    from longread.cli.outputs import check_figures, listed, progress_console, show_figures, write_text
    from longread.config import UserError
    from longread.evaluate import (
        HUMAN,
        DecodingQuality,
        WrittenTexts,
        check_bins,
        check_judge,
        decoding_figures,
        decoding_notes,
        prompts,
        verdicts,
        write,
    )
    from longread.loading import open_model
    from longread.session import Sampling

    check_at_most("--context", options.context)
    check_figures(options, ["judged_loss_by_position"], inputs=options.data)
    sampling = Sampling(
        temperature=options.temperature, top_p=options.top_p, repetition_penalty=options.repetition_penalty
    )
    T, bins = options.context, options.bins
    written = T - T // 2 if options.written is None else options.written
    if T < 2:
        raise UserError(f"--context {T} cannot be both read and written; give at least 2")
    if written >= T:
        raise UserError(f"--written {written} leaves nothing of --context {T} to read; lower it")
    if T % bins:
        raise UserError(f"--context {T} does not divide into --bins {bins}; give a multiple, {T + bins - T % bins}")
    check_bins(bins, T - written, T)
    judge = _judge(options.judge, options.device)
    console = progress_console(options)
    names = table_names(options.models)
    models = [open_model(path, options.device)._replace(name=n) for path, n in zip(options.models, names, strict=True)]
    opened = [settle_reading(options, model) for model in models]
    tokenizer = opened[0].tokenizer
    for path, other in zip(options.models, opened, strict=True):
        if other.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{path} has another tokenizer than {options.models[0]}: they would write different amounts of text; "
                "judge them one by one"
            )
    documents = read_documents(
        options.data,
        opened[0],
        first=options.documents,
        min_tokens=T,
        max_tokens=T,
        asked_by="--context",
        text_format=format_of(options),
    )
    human = prompts(documents, T)
    check_judge(judge, tokenizer, human, [(model.name, model.fingerprint) for model in models])
    writings = [WrittenTexts(HUMAN, "human", human, written=written)]
    for model in opened:
        learns = model.learns and model.model.config.num_suffix_blocks > 0
        for learn in (True, False) if learns and not options.no_control else (learns,):
            with console.status(f"{model.name} continues {len(human)} documents {'learning' if learn else 'frozen'}"):
                writings.append(
                    write(
                        model.name,
                        model.model,
                        model.inner,
                        tokenizer,
                        human,
                        learn=learn,
                        sampling=sampling,
                        seed=options.seed,
                        batch_size=options.batch_size,
                        written=written,
                    )
                )
    with console.status(f"{judge.name} judges"):
        found = verdicts(judge, tokenizer, writings, bins=bins, batch_size=options.batch_size)
    same = judge.tokenizer.fingerprint == tokenizer.fingerprint
    notes = decoding_notes(writings, tokenizer, judge)
    quality = DecodingQuality(judge.name, same, len(human), T - written, sampling, options.seed, found, notes)
    if options.json:
        write_text(options.json, json.dumps(quality.as_json(), indent=2) + "\n")
    lead = f"{listed(options.models)} on {listed(options.data)}; temperature {sampling.temperature:g}, "
    lead += f"top-p {sampling.top_p:g}, repetition penalty {sampling.repetition_penalty:g}."
    figures = decoding_figures(quality)
    show_figures(options, figures, title=f"Judged by {judge.name}", lead=lead)
    return 0


def _judge(path: str, device: str) -> Judge:
    from pathlib import Path

    from longread.config import UserError
    from longread.evaluate import HuggingFaceJudge, LongreadJudge, is_hugging_face
    from longread.loading import open_model
    from longread.model import find_device

    if is_hugging_face(path):
        if not (Path(path) / "tokenizer.json").is_file():
            raise UserError(f"{path} has no tokenizer.json beside it; copy there the one it was trained with")
        return HuggingFaceJudge(path, find_device(device))
    opened = open_model(path, device)
    return LongreadJudge(
        opened.name,
        opened.model,
        opened.inner,
        opened.tokenizer,
        opened.fingerprint,
        learn=opened.learns,
        context_limit=_context_limit(opened),
    )


def _context_limit(opened: OpenModel) -> int | None:
    """Tokens of the longest text that full attention was trained on; None for windows, and where nothing says it."""
    config, origin = opened.model.config, opened.provenance
    if all(config.window_of(block) is not None for block in range(config.num_blocks)):
        return None
    known: list[int] = []
    while origin:
        known += [origin[name] for name in ("context", "context_length") if name in origin]  # of pretraining, of a run
        origin = origin.get("adapted_from", {}).get("provenance", {})
    return max(known, default=None)
