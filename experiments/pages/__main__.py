"""Pages from what `experiments.run` left: tables, plots and results.json of each experiment; text comes by hand.

    python -m experiments.pages first.tar.xz second.tar.xz --date 2026-11-22

Makes experiments/DATE_SLUG/ with README.md (tables, and the questions that the text must answer), results.json (every
figure of the tables) and PNG plots on a transparent ground, readable in light and dark. A page that is there already
keeps its README.md; give --overwrite to begin anew. Nothing is made of an experiment without results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.pages import (
    ablations,
    boxed,
    context,
    decoding,
    derivation,
    meta,
    needles,
    rates,
    stability,
    toy,
)
from experiments.results import Results

HERE = Path(__file__).resolve().parents[1]
PAGES = (boxed, context, rates, meta, stability, ablations, derivation, toy, needles, decoding)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="+", type=Path, help="results.tar.xz, later ones win")
    parser.add_argument("--date", required=True)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    found = Results()
    for archive in options.archives:
        found.load(archive)
    for module in PAGES:
        page = module.make(found) if all(name in found.evaluations for name in module.NEEDS) else None
        if page is not None and page.parts:
            folder = options.out / f"{options.date}_{page.slug}"
            page.write(folder, options.overwrite)
            print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
