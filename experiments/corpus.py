"""The corpus of the small experiments: books and Python source, from archives to token shards.

    python -m experiments.corpus pack --books books-train.tar.xz --validation books-validation.tar.xz --out packed
    python -m experiments.corpus unpack --packed packed --out work/data

`pack` needs only a CPU, and minutes of it: it gathers permissively licensed Python source from the Python that runs it,
trains a byte-level BPE on both kinds of text, encodes what is trained on, decides how held-out text is cut, and leaves
archives. With `--like models/longread-small` books and packages are those of that model, and so, with equal versions,
is the tokenizer. `unpack` takes seconds and makes from them

    train/              training tokens: all books and all source, one data set for every method
    books-L/, code-L/   held-out text in stretches of L * 1024 tokens, L = 1 ... 64; the same text for every L <= 32
    text/               the held-out texts themselves

Held out are whole books of authors that no training book has, and, of the source, the standard library's modules in
`HELD_OUT_MODULES` and the packages in `HELD_OUT_PACKAGES`. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import hashlib
import importlib.metadata
import io
import json
import lzma
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from longread.data import TokenDataset, prepare
from longread.data.shards import INDEX
from longread.tokenizer import Tokenizer, load_tokenizer, train_bpe

KINDS = ("books", "code")
VOCABULARY = 4096
SAMPLE = {"books": 16_000_000, "code": 4_000_000}
"""Bytes that the tokenizer is trained on."""
UNIT = 1024
LENGTHS = (1, 2, 4, 8, 16, 32)
LONG = 64
"""Of stretches of held-out text, in units."""
SHARD_TOKENS = 1 << 23
"""Small ones: several processes unpack them, and they can travel one by one."""
OF_TOKENS = {"id": lzma.FILTER_LZMA2, "preset": 4, "lc": 0, "lp": 1, "pb": 1, "dict_size": 1 << 25}
"""Compression of numbers of two bytes."""
SLACK = 12
"""Tokens that a stretch has beyond its length: cutting and encoding again may lose one or two."""

HELD_OUT_MODULES = (
    "argparse.py",
    "asyncio",
    "concurrent",
    "email",
    "http",
    "logging",
    "multiprocessing",
    "tarfile.py",
    "typing.py",
    "unittest",
    "urllib",
    "xml",
)
"""Of the standard library; what reads with a model trained here and wants unseen text takes these."""
HELD_OUT_PACKAGES = ("click", "jinja2", "werkzeug")
LICENCES = ("MIT", "BSD", "Apache", "PSF", "Python Software Foundation", "0BSD", "ISC")
LEFT_OUT = re.compile(
    r"(^|/)(tests?|testing|_vendor|vendor|_vendored|externals?|extern|third_party|site-packages|dist-packages|idlelib"
    r"|lib2to3|turtledemo|ensurepip|encodings|pydoc_data|__pycache__|_distutils|lib-dynload|config-[^/]*)(/|$)|_pb2"
)
DOCUMENT_BYTES = 250_000
"""Source is joined file after file, folder by folder, to documents of at least this size: long texts to learn from."""
PACKAGE_BYTES = 1_600_000
"""At most this much of one package."""
LARGEST_FILE = 300_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("--books", type=Path, nargs="+", required=True, help="archives with train/*.txt")
    packing.add_argument("--validation", type=Path, required=True, help="archive with validation/*.txt")
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--book-bytes", type=int, default=10**12, help="of unpacked training text, at most")
    packing.add_argument("--code-bytes", type=int, default=10**12)
    packing.add_argument("--like", type=Path, help="a model whose books and packages to take, and no others")
    packing.add_argument("--unit", type=int, default=UNIT, help="tokens of the shortest stretch (default 1024)")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("--packed", type=Path, required=True)
    unpacking.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "pack":
        pack(options.books, options.validation, options.out, options.book_bytes, options.code_bytes, options.like)
        cut(options.out, options.unit)
    else:
        unpack(options.packed, options.out)
    return 0


def pack(
    books: list[Path], validation: Path, out: Path, book_bytes: int, code_bytes: int, like: Path | None = None
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    checksums, names = (None, None) if like is None else sources_of(like)
    found = (text for path in books for text in texts_of(path))
    train = first([t for t in found if checksums is None or hashlib.sha256(t[1]).hexdigest() in checksums], book_bytes)
    held_out = list(texts_of(validation))
    code, held_out_code, packages = python_source(code_bytes, names)
    sample = [*evenly(train, SAMPLE["books"]), *evenly(code, SAMPLE["code"])]
    tokenizer = train_bpe((text.decode() for _, text in sample), VOCABULARY)
    tokenizer.save(out)
    write_archive(out / "books.tar.xz", [("validation", held_out)])
    write_archive(out / "code.tar.xz", [("validation", held_out_code)])
    pack_tokens([train, code], tokenizer, out / "train")
    all_texts = {"books": train, "code": code, "books held out": held_out, "code held out": held_out_code}
    facts = {
        "tokenizer": tokenizer.fingerprint,
        "python": sys.version.split()[0],
        "packages": packages,
        "held_out": {"books": [name for name, _ in held_out], "code": [name for name, _ in held_out_code]},
        "bytes": {name: sum(len(text) for _, text in texts) for name, texts in all_texts.items()},
        "documents": {"books": len(train), "code": len(code)},
        "tokens": json.loads((out / "train" / INDEX).read_text(encoding="utf-8"))["num_tokens"],
    }
    (out / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    print(json.dumps(facts["bytes"] | {"files": sizes}, indent=1))


def sources_of(model: Path) -> tuple[set[str], set[str]]:
    """Checksums of the books that a model of this corpus was trained on, and the packages, by its list and its card."""
    with (model / "books.tsv").open(encoding="utf-8", newline="") as file:
        checksums = {row["sha256"] for row in csv.DictReader(file, delimiter="\t") if row["split"] == "train"}
    card = (model / "README.md").read_text(encoding="utf-8")
    _, _, packages = card.partition("parts of ")
    return checksums, {"python", *re.findall(r"(\w+) \(", packages.partition("Held out")[0]), *HELD_OUT_PACKAGES}


def pack_tokens(kinds: list[list[tuple[str, bytes]]], tokenizer: Tokenizer, out: Path) -> None:
    """A data set of the texts in that order, its shards compressed: encoded here, where no GPU waits for it."""
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "text"
        for kind, texts in zip(KINDS, kinds, strict=True):
            (text / kind).mkdir(parents=True)
            for name, content in texts:
                (text / kind / name).write_bytes(content)
        made = Path(temporary) / "train"
        prepare([text / kind for kind in KINDS], made, tokenizer, shard_tokens=SHARD_TOKENS)
        index = json.loads((made / INDEX).read_text(encoding="utf-8"))
        index["sources"] = [Path(source).relative_to(text).as_posix() for source in index["sources"]]
        (made / INDEX).write_text(json.dumps(index), encoding="ascii")
        compress(made, out)


def compress(dataset: Path, out: Path) -> None:
    """A data set with each shard as an archive of its own, so that several processes undo it at once."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in sorted(path for path in dataset.iterdir() if path.is_file()):
        if path.suffix == ".bin":
            packed = lzma.compress(path.read_bytes(), filters=[OF_TOKENS])
            (out / f"{path.name}.xz").write_bytes(packed)
        else:
            shutil.copyfile(path, out / path.name)


def texts_of(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the .txt files of an archive, in its order."""
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".txt"):
                yield Path(member.name).name, tar.extractfile(member).read()  # type: ignore[union-attr]


def first(texts: list[tuple[str, bytes]], limit: int) -> list[tuple[str, bytes]]:
    """The texts, in an order without meaning, that together stay below the limit."""
    taken, size = [], 0
    for name, text in sorted(texts, key=lambda pair: hashlib.sha256(pair[0].encode()).digest()):
        if size + len(text) <= limit:
            taken.append((name, text))
            size += len(text)
    return sorted(taken)


def evenly(texts: list[tuple[str, bytes]], limit: int) -> list[tuple[str, bytes]]:
    """The same share of each text, about `limit` bytes in all, up to the end of a line."""
    share = min(1.0, limit / max(1, sum(len(text) for _, text in texts)))
    return [(name, text[: text.rfind(b"\n", 0, int(len(text) * share) + 1) + 1]) for name, text in texts]


def write_archive(path: Path, folders: list[tuple[str, list[tuple[str, bytes]]]]) -> None:
    with lzma.open(path, "wb", preset=9 | lzma.PRESET_EXTREME) as file, tarfile.open(fileobj=file, mode="w|") as tar:
        for folder, texts in folders:
            for name, text in texts:
                info = tarfile.TarInfo(f"{folder}/{name}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))


def python_source(
    limit: int, names: set[str] | None = None
) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]], dict[str, str]]:
    """Training documents, held-out documents, and the packages they come from with their licences.

    `names`: of these packages alone; the standard library is "python".
    """
    library, site = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
    found = [("python", library, "PSF-2.0")]
    for distribution in importlib.metadata.distributions():
        licence = permissive(distribution.metadata)
        if licence is None:
            continue
        tops = {file.parts[0] for file in distribution.files or () if file.suffix == ".py" and len(file.parts) > 1}
        found += [
            (top, site / top, licence) for top in tops if (site / top).is_dir() and not top.startswith((".", "_"))
        ]
    train, held_out, packages = [], [], {}
    for name, root, licence in sorted(entry for entry in found if names is None or entry[0] in names):
        kept, apart = [], []
        for unit, text in units(root):
            apart_too = name in HELD_OUT_PACKAGES or (name == "python" and unit in HELD_OUT_MODULES)
            (apart if apart_too else kept).append((unit, text))
        kept = first(kept, PACKAGE_BYTES if name != "python" else 10**9)
        packages |= {name: licence} if kept or apart else {}
        train += documents(name, kept)
        held_out += documents(name, apart)
    return first(train, limit), held_out, packages


def permissive(metadata: importlib.metadata.PackageMetadata) -> str | None:
    """The licence a distribution declares, if it is one of `LICENCES` and nothing else."""
    declared = metadata.get("License-Expression") or ""
    if declared:
        parts = re.split(r"\s+(?:AND|OR|WITH)\s+", declared.strip("()"))
    else:
        parts = [c.split("::")[-1].strip() for c in metadata.get_all("Classifier") or () if c.startswith("License ::")]
        parts = [part for part in parts if part != "OSI Approved"]
        parts = parts or [(metadata.get("License") or "").strip().split("\n")[0]]
    fine = parts and all(any(part.strip("() ").startswith(name) for name in LICENCES) for part in parts)
    return " and ".join(parts) if fine else None


def units(root: Path) -> Iterator[tuple[str, bytes]]:
    """The modules and folders directly under a package, each as one text: its files, each after its name."""
    for entry in sorted(root.iterdir()):
        files = sorted(entry.rglob("*.py")) if entry.is_dir() else [entry] if entry.suffix == ".py" else []
        parts = []
        for file in files:
            name = file.relative_to(root).as_posix()
            if LEFT_OUT.search(name) or file.is_symlink():
                continue
            text = file.read_bytes().replace(b"\r\n", b"\n")
            if 200 <= len(text) <= LARGEST_FILE and is_prose(text):
                parts.append(
                    f"# {root.name if root.name != 'site-packages' else ''}/{name}\n".encode()
                    + text.rstrip()
                    + b"\n\n\n"
                )
        if parts:
            yield entry.name, b"".join(parts)


def is_prose(text: bytes) -> bool:
    """Source that somebody wrote to be read: UTF-8, not generated, no table of numbers."""
    try:
        head = text.decode()[:1000].lower()
    except UnicodeDecodeError:
        return False
    letters = sum(character.isalpha() for character in text[:20_000].decode(errors="ignore"))
    return "generated" not in head and "do not edit" not in head and letters > 0.45 * min(len(text), 20_000)


def documents(package: str, parts: Iterable[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Neighbours joined until they are long; a last short one joins the one before."""
    made: list[bytes] = []
    for _, text in parts:
        if made and len(made[-1]) < DOCUMENT_BYTES:
            made[-1] += text
        else:
            made.append(text)
    if len(made) > 1 and len(made[-1]) < DOCUMENT_BYTES:
        made[-2:] = [made[-2] + made[-1]]
    return [(f"{package}-{i:02d}.txt", text) for i, text in enumerate(made)]


def cut(packed: Path, unit: int) -> None:
    """Leaves `cuts.json`: where each held-out text is cut into stretches, in bytes, for every length."""
    tokenizer = load_tokenizer(packed)
    table: dict[str, dict[str, list[list[int]]]] = {}
    for kind in KINDS:
        rows: dict[int, list[list[int]]] = {length: [] for length in (*LENGTHS, LONG)}
        for i, text in enumerate(held_out_texts(packed, kind)):
            for start, end in stretches(text, 0, len(text), tokenizer, LENGTHS[-1] * unit, LENGTHS[-1]):
                for length in LENGTHS:
                    rows[length] += [[i, *part] for part in stretches(text, start, end, tokenizer, length * unit)]
            rows[LONG] += [[i, *part] for part in stretches(text, 0, len(text), tokenizer, LONG * unit)]
        table[kind] = {str(length): found for length, found in rows.items()}
        print(kind, {length: len(found) for length, found in rows.items()})
    (packed / "cuts.json").write_text(json.dumps(table), encoding="utf-8")


def held_out_texts(packed: Path, kind: str) -> list[bytes]:
    with tarfile.open(packed / f"{kind}.tar.xz", "r:xz") as tar:
        members = sorted((m for m in tar if m.name.startswith("validation/")), key=lambda member: member.name)
        return [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]


def stretches(
    text: bytes, start: int, end: int, tokenizer: Tokenizer, length: int, parts: int = 1
) -> Iterator[tuple[int, int]]:
    """Neighbouring stretches of text[start:end] of `length` tokens each and a few more; what is left over is dropped.

    `parts`: how many shorter ones each of them will be cut into.
    """
    ends = [start]
    for count in tokenizer.encode_with_bytes(text[start:end].decode())[1]:
        ends.append(ends[-1] + count)
    first, wanted = 0, length + SLACK * parts
    while first + wanted < len(ends):
        last = first + wanted
        while last < len(ends) - 1 and text[ends[last] : ends[last] + 1] not in (b" ", b"\n"):
            last += 1
        yield ends[first], ends[last]
        first = last


def unpack(packed: Path, out: Path) -> None:
    """Everything that training and evaluation read; in many processes, so that no GPU waits long."""
    cuts = json.loads((packed / "cuts.json").read_text(encoding="utf-8"))
    text = out / "text"
    with concurrent.futures.ProcessPoolExecutor(max(2, (os.cpu_count() or 1) // 2)) as pool:
        shards = sorted((packed / "train").glob("*.xz"))
        (out / "train").mkdir(parents=True, exist_ok=True)
        unpacked = [pool.submit(decompress, shard, out / "train" / shard.stem) for shard in shards]
        list(pool.map(extract, [packed] * len(KINDS), KINDS, [text] * len(KINDS)))
        made = []
        for kind in KINDS:
            files = sorted((text / kind / "validation").iterdir())
            held_out = [path.read_bytes() for path in files]
            for length, rows in cuts[kind].items():
                lines = [json.dumps({"text": held_out[i][start:end].decode()}) + "\n" for i, start, end in rows]
                source = text / f"{kind}-{length}.jsonl"
                source.write_text("".join(lines), encoding="utf-8")
                if lines:
                    made.append(pool.submit(tokenize, [source], out / f"{kind}-{length}", packed))
        for future in [*unpacked, *made]:
            print(*future.result())
    for path in (packed / "train").glob("*.json"):
        shutil.copyfile(path, out / "train" / path.name)
    print("train", TokenDataset.open(out / "train").num_tokens)


def decompress(packed: Path, out: Path) -> tuple[str, int]:
    return out.name, out.write_bytes(lzma.decompress(packed.read_bytes()))


def extract(packed: Path, kind: str, text: Path) -> None:
    with tarfile.open(packed / f"{kind}.tar.xz", "r:xz") as tar:
        tar.extractall(text / kind, filter="data")


def tokenize(sources: list[Path], out: Path, packed: Path) -> tuple[str, int, int]:
    dataset = prepare(sources, out, load_tokenizer(packed), overwrite=True)
    return out.name, dataset.num_documents, dataset.num_tokens


if __name__ == "__main__":
    sys.exit(main())
