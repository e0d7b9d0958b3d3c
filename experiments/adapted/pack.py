"""What the experiments with an adapted model read, in pieces that travel one by one.

    python -m experiments.adapted.pack --gguf MODEL.gguf --tokens TOKENS --books VALIDATION --out PIECES

PIECES/p1, p2, … hold parts of the GGUF file, and the last one the tokens of every second training book,
compressed, and the validation books. All of them in one folder are what `unpack` makes these from:

    source.gguf     the pretrained model
    train/          training tokens; so with every other folder of tokens that lies there
    books/          the texts of the validation books
    validation/     their tokens, a document each
    joined/         the same as one document
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from experiments.corpus import compress, decompress, texts_of, write_archive

from longread.data import TokenDataset, prepare
from longread.data.shards import INDEX, ShardWriter
from longread.tokenizer import load_tokenizer

PART_BYTES = 33_000_000
EVERY = 2
SHARD_TOKENS = 1 << 22


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the pretrained model; a rehearsal needs none")
    parser.add_argument("--tokens", type=Path, required=True, help="what `longread prepare` made of training books")
    parser.add_argument("--books", type=Path, required=True, help="folder with the texts of the validation books")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--every", type=int, default=EVERY, metavar="N", help="keep each N-th training book (default 2)"
    )
    options = parser.parse_args(arguments)
    parts = 0
    if options.gguf:
        content = options.gguf.read_bytes()
        for start in range(0, len(content), PART_BYTES):
            parts += 1
            piece = options.out / f"p{parts}"
            piece.mkdir(parents=True, exist_ok=True)
            (piece / f"source.gguf.{parts:02d}").write_bytes(content[start : start + PART_BYTES])
    last = options.out / f"p{parts + 1}"
    last.mkdir(parents=True, exist_ok=True)
    facts = pack_tokens(options.tokens, last / "train", options.every)
    books = sorted(options.books.glob("*.txt"))
    write_archive(last / "books.tar.xz", [("books", [(path.name, path.read_bytes()) for path in books])])
    facts |= {"validation": [path.name for path in books]}
    (last / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for piece in sorted(options.out.iterdir()):
        print(piece, sum(path.stat().st_size for path in piece.rglob("*") if path.is_file()))
    return 0


def pack_tokens(source: Path, out: Path, every: int) -> dict[str, object]:
    """Each `every`-th document of a data set as another one, compressed; what is kept of it."""
    found = TokenDataset.open(source)
    index = json.loads((source / INDEX).read_text(encoding="utf-8"))
    names = [Path(found.document_name(i)).name for i in range(0, found.num_documents, every)]
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "train"
        writer = ShardWriter(made, index["vocab_size"], SHARD_TOKENS)
        for i, name in zip(range(0, found.num_documents, every), names, strict=True):
            writer.begin_document(name, None)
            writer.add(np.asarray(found.document(i)), found.document_bytes(i))
        writer.finish({key: index[key] for key in ("bos_id", "tokenizer", "documents", "text", "skipped")})
        for path in source.glob("tokenizer*.json"):
            shutil.copyfile(path, made / path.name)
        compress(made, out)
    return {"tokens": writer.num_tokens, "tokenizer": index["tokenizer"], "training": names}


def unpack(packed: Path, out: Path) -> None:
    """Everything that the jobs read. Raises `FileNotFoundError` where a piece is missing."""
    out.mkdir(parents=True, exist_ok=True)
    parts = sorted(packed.glob("source.gguf.*"))
    with (out / "source.gguf").open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    with concurrent.futures.ThreadPoolExecutor() as pool:  # lzma lets other threads run
        for index in packed.glob(f"*/{INDEX}"):
            place = out / index.parent.name
            place.mkdir(exist_ok=True)
            for path in index.parent.iterdir():
                if path.suffix == ".xz":
                    pool.submit(decompress, path, place / path.stem)
                else:
                    shutil.copyfile(path, place / path.name)
    with tarfile.open(packed / "books.tar.xz", "r:xz") as tar:
        tar.extractall(out, filter="data")
    tokenizer = load_tokenizer(out / "train")
    prepare([out / "books"], out / "validation", tokenizer, overwrite=True)
    whole = out / "joined.txt"
    whole.write_bytes(b"\n\n".join(text for _, text in texts_of(packed / "books.tar.xz")))
    prepare([whole], out / "joined", tokenizer, overwrite=True)


if __name__ == "__main__":
    sys.exit(main())
