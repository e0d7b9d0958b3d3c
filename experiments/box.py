"""Makes models/longread-small from what `experiments.run` left.

    python -m experiments.box OUT/box-32.safetensors --results OUT/results.tar.xz

Writes model.safetensors (bfloat16), config.json, tokenizer.json and the model card, all in one directory that
`load_model`, `longread read` and `make demo` take. With --packed and --manifest (lines of JSON: file, title, author,
year, source, sha256) also books.tsv, which says what each book is and where it comes from.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from experiments.corpus import HELD_OUT_MODULES, HELD_OUT_PACKAGES
from experiments.page import Table, as_stored
from experiments.pages import boxed
from experiments.results import Results

from longread.checkpoint import load_model, save_model

LARGEST = 16_000_000
MODEL = Path(__file__).resolve().parents[1] / "models" / "longread-small"
RETRAIN = """python -m experiments.corpus pack --books BOOKS.tar.xz --validation HELD_OUT.tar.xz --out packed
python -m experiments.run --packed packed --work work --out out --seconds 3600 --only 'box*' 'twin*'
python -m experiments.box out/box-32.safetensors --results out/results.tar.xz"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--results", type=Path, nargs="+", required=True, help="results.tar.xz, later ones win")
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--packed", type=Path, help="what `experiments.corpus pack` left")
    parser.add_argument("--manifest", type=Path, help="of the archives of books")
    options = parser.parse_args()
    found = Results()
    for archive in options.results:
        found.load(archive)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (options.out / name).write_bytes(member(options.results, name))
    with tempfile.TemporaryDirectory() as staging:
        config = member(options.results, f"models/{options.weights.stem}/config.json")
        (Path(staging) / "config.json").write_bytes(config)
        shutil.copyfile(options.weights, Path(staging) / "model.safetensors")
        loaded = load_model(staging, dtype=torch.bfloat16)
    provenance = loaded.metadata["provenance"] | {"held_out_modules": list(HELD_OUT_MODULES)}
    save_model(options.out, loaded.model, loaded.inner, loaded.metadata["tokenizer_fingerprint"], provenance)
    size = (options.out / "model.safetensors").stat().st_size
    if size > LARGEST:
        raise SystemExit(f"the weights have {size:,} bytes; the box holds {LARGEST:,}")
    tables = boxed.tables(as_stored(boxed.gather(found)))
    (options.out / "README.md").write_text(card(found, tables, loaded.model.config.num_parameters), encoding="utf-8")
    if options.packed and options.manifest:
        (options.out / "books.tsv").write_text(table_of_books(options.packed, options.manifest), encoding="utf-8")
    print(f"{options.out}: {size:,} bytes")
    return 0


def member(archives: list[Path], name: str) -> bytes:
    """A file out of the last archive that has it."""
    for archive in reversed(archives):
        with tarfile.open(archive) as tar:
            if name in tar.getnames():
                file = tar.extractfile(name)
                return file.read() if file else b""
    raise SystemExit(f"none of the results has {name}")


def table_of_books(packed: Path, manifest: Path) -> str:
    """The books of a corpus, a line each."""
    known = {Path(row["file"]).name: row for row in map(json.loads, manifest.read_text(encoding="utf-8").splitlines())}
    columns = ("author", "title", "year", "source", "sha256")
    lines = ["\t".join(("split", *columns))]
    trained = json.loads((packed / "train" / "index.json").read_text(encoding="utf-8"))["sources"]
    with tarfile.open(packed / "books.tar.xz") as tar:
        names = [("train", Path(name).name) for name in trained if name.startswith("books/")]
        names += [("validation", Path(name).name) for name in tar.getnames()]
    for split, name in sorted(names):
        lines.append("\t".join((split, *(str(known[name].get(column) or "") for column in columns))))
    return "\n".join(lines) + "\n"


def card(found: Results, tables: Iterable[Table], parameters: int) -> str:
    """The model card: what it is, what it was trained on, how well it reads, what it cannot do."""
    sizes = found.corpus.get("bytes", {})
    books = found.corpus.get("documents", {}).get("books", 0)
    jobs = found.state.get("jobs", {})
    chain = [name for name in ("box", "box-8", "box-32") if name in jobs]
    tokens = sum(jobs[name]["tokens"] for name in chain)
    steps = ", ".join(f"{jobs[name]['tokens'] / 1e6:.0f}M tokens at {jobs[name]['context']}K" for name in chain)
    packages = ", ".join(
        f"{name} ({licence.removesuffix(' License')})"
        for name, licence in sorted(found.corpus.get("packages", {}).items())
        if name not in (*HELD_OUT_PACKAGES, "python")
    )
    source = f"the standard library of Python {found.corpus.get('python', '')} (PSF-2.0) and parts of {packages}"
    held_out = ", ".join(f"`{name}`" for name in HELD_OUT_MODULES)
    losses = "\n\n".join(table.text for table in tables)
    return f"""# longread-small

A TTT-E2E model that keeps learning while it reads: {parameters:,} parameters in bfloat16, English prose of before 1930
and Python source, a byte-level BPE of 4096 tokens. It is there so that a fresh clone reads, generates and serves
something real within seconds, not to know or to do anything.

    longread read book.txt --model models/longread-small

## Data

{sizes.get("books", 0) / 1e6:.0f} MB of {books} whole books in the public domain in the United States, listed with
source and checksum in [books.tsv](books.tsv): from collections by Project Gutenberg, Standard Ebooks (CC0), ELTeC (COST
Action CA16204, ed. Lou Burnard; its mark-up, which was removed, is CC BY 4.0) and others. Licence headers, notes and
mark-up were removed. Some authors died after 1954, so their books may be protected outside the United States. And
{sizes.get("code", 0) / 1e6:.0f} MB of permissively licensed Python source: {source}.
Held out and never trained on: seven books by authors that no training book has, the standard library's modules
{held_out}, and the packages click, jinja2 and werkzeug.

## Recipe

`small` (window 1024, mini-batch 128, 8 blocks of width 256, 2 of them learn),
{tokens / 1e6:.0f}M tokens: {steps}. `experiments/plan.py` has every setting. To train it
again, given archives of books:

```bash
{RETRAIN}
```

## Loss

Nats per token on held-out text. "Frozen" are the same weights, read without learning; twins have as many parameters and
were trained on the same tokens. Intervals treat stretches as independent; they come from few sources (seven books), so
the intervals are too narrow. The rates of training were chosen on these books.

{losses}

## Limits

It repeats itself, invents facts, holds the views of its old books, and recalls no detail beyond its window of 1024
tokens. One seed. Nobody has aligned or filtered it. Under the Apache License 2.0, as Longread.
"""


if __name__ == "__main__":
    sys.exit(main())
