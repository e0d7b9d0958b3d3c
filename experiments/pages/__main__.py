"""The pages of the experiments: every table again from the results.json beside it, or all of a new round.

    python -m experiments.pages
    python -m experiments.pages first.tar.xz second.tar.xz --date 2026-11-22

The first writes the tables of each page anew and nothing else: text is written by hand. The second takes what
`experiments.run` left and makes experiments/DATE_SLUG/ with results.json (every figure of the tables), plots in SVG
and, where there is none yet, a README.md that begins with the questions the text must answer; later archives win, and
nothing is made of an experiment without results. To a page of that date which can `merge`, archives add what they
have measured: rows of earlier runs stay, and each row says of which run it is (`experiments.merging`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.page import Table, as_stored, with_tables, write
from experiments.pages import (
    ablations,
    adapted,
    answers,
    boxed,
    context,
    decoding,
    demo,
    derivation,
    equal,
    kept_tokens,
    meta,
    needles,
    pretrained,
    rates,
    recall,
    speculative,
    stability,
    toy,
)
from experiments.results import Results

HERE = Path(__file__).resolve().parents[1]
README = HERE.parent / "README.md"
CARD = HERE.parent / "models" / "longread-small" / "README.md"
PAGES = (
    boxed,
    context,
    rates,
    meta,
    equal,
    stability,
    ablations,
    derivation,
    toy,
    needles,
    decoding,
    adapted,
    answers,
    recall,
    kept_tokens,
)
OTHERS = (demo, pretrained, speculative)
"""Of other commands, each of which left several files of figures."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="*", type=Path, help="results.tar.xz; without any: the tables again")
    parser.add_argument("--date", help="of the round that the archives hold")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    if not options.archives:
        for page, text in again().items():
            page.write_text(text, encoding="utf-8")
        return 0
    if not options.date:
        parser.error("archives need --date")
    found = loaded(options.archives)
    for module in PAGES:
        folder = options.out / f"{options.date}_{module.SLUG}"
        before = kept(folder)
        complete = all(name in found.evaluations for name in module.NEEDS)
        if hasattr(module, "merge") and (before or complete):
            results = before
            for each in map(loaded, ([archive] for archive in options.archives)):
                results = as_stored(module.merge(results, as_stored(module.gather(each)), each.run))
            made = module.plots(results)
        elif complete:
            results, made = as_stored(module.gather(found)), module.plots(found)
        else:
            continue
        if results and results != before:
            write(folder, module.HEADING, results, list(module.tables(results)), made)
            print(folder)
    return 0


def loaded(archives: Iterable[Path]) -> Results:
    found = Results()
    for archive in archives:
        found.load(archive)
    return found


def kept(folder: Path) -> Any:
    """The figures of a page that is there."""
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def again() -> dict[Path, str]:
    """What each page is, with its tables made anew from the figures that are kept; README and model card among them."""
    tables: dict[Path, list[Table]] = {}
    for module in PAGES:
        for folder in HERE.glob(f"*_{module.SLUG}"):
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            tables[folder / "README.md"] = list(module.tables(results))
            if module is boxed:
                tables[CARD] = list(module.tables(results))
            if module is equal:
                tables.setdefault(README, []).append(module.summary(results))
    for other in OTHERS:
        for folder in HERE.glob(f"*_{other.SLUG}"):
            files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
            tables[folder / "README.md"] = list(other.tables(files))
            if other is pretrained:
                tables.setdefault(README, []).append(pretrained.summary(files))
    return {page: with_tables(page, made) for page, made in tables.items()}


if __name__ == "__main__":
    sys.exit(main())
