"""Small tokenizers of every kind in use, trained on a few lines, and texts that are hard to cut for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from longread.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, train_bpe

CORPUS = [
    "The tide comes in, and the gulls don't mind; they've 1234567 fish to find.\n\n    They'll wait there.\r\n" * 30,
    "def depth(x):\n        return x[0:12] + 3.14  # naïve – “cafe\u0301” 日本語の海 한국어 🦊👩‍👩‍👧\n\n\n" * 30,
]
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA_3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA_3.replace("{1,3}", "")
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS + "?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTIONS + "?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(split: Any = None, normalizer: Any = None, **options: Any) -> tokenizers.Tokenizer:
    """BPE over bytes, its words made by `split`, or by GPT-2's rule."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=options.pop("add_prefix_space", False), use_regex=not split)
    raw = tokenizers.Tokenizer(models.BPE(**options))
    raw.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    return _trained(raw, trainers.BpeTrainer, initial_alphabet=sorted(byte_level.alphabet()))


def _trained(raw: tokenizers.Tokenizer, trainer: Callable[..., Any], **options: Any) -> tokenizers.Tokenizer:
    raw.train_from_iterator(CORPUS, trainer(vocab_size=500, show_progress=False, special_tokens=["<s>"], **options))
    return raw


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _deepseek() -> tokenizers.Tokenizer:
    return _byte_level([_split(r"\p{N}{1,3}"), _split("[一-龥぀-ゟ゠-ヿ]+"), _split(QWEN)])


def _falcon() -> tokenizers.Tokenizer:
    return _byte_level(
        [pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.Digits(False), _split("[0-9][0-9][0-9]")]
    )


def _bloom() -> tokenizers.Tokenizer:
    return _byte_level([_split(r" ?[^(\s|[.,!?…。，、।۔،])]+")])


def _digits_from_the_right() -> tokenizers.Tokenizer:
    """Groups of three digits as people write them: where a group begins depends on how many digits follow."""
    return _byte_level([_split(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"), _split(LLAMA_3)])


def _sentencepiece(normalizer: Any, pre_tokenizer: Any = None, **options: Any) -> tokenizers.Tokenizer:
    """BPE with byte fallback, as SentencePiece models are converted: mostly without any words."""
    vocabulary = [
        "<unk>",
        "<s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyzTéは海.,'0123456789\n",
    ]
    pairs = [
        ("▁", "▁"),
        ("▁▁", "▁▁"),
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("e", "r"),
        ("▁", "t"),
        ("0", "0"),
        ("a", "a"),
    ]
    pairs += [("aa", "aa"), ("\n", "\n"), ("は", "海"), (".", "▁"), ("1", "2"), ("d", "e"), ("▁", "de"), ("o", "n")]
    vocabulary += [left + right for left, right in pairs]
    ids = {token: i for i, token in enumerate(vocabulary)}
    raw = tokenizers.Tokenizer(models.BPE(ids, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if normalizer is not None:
        raw.normalizer = normalizer
    if pre_tokenizer is not None:
        raw.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if options.get("strip", True) else steps)
    raw.add_special_tokens(["<unk>", "<s>"])
    return raw


def _llama_2() -> tokenizers.Tokenizer:
    return _sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def _gemma() -> tokenizers.Tokenizer:
    return _sentencepiece(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), strip=False)


def _metaspace(scheme: str, split: bool) -> Callable[[], tokenizers.Tokenizer]:
    return lambda: _sentencepiece(None, pre_tokenizers.Metaspace("▁", scheme, split))


def _unigram() -> tokenizers.Tokenizer:
    """As T5: NFKC, runs of spaces become one, the ends are stripped."""
    raw = tokenizers.Tokenizer(models.Unigram())
    steps = [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    raw.normalizer = normalizers.Sequence(steps)
    raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    raw.decoder = decoders.Metaspace("▁", "always")
    return _trained(raw, trainers.UnigramTrainer, unk_token="<unk>")


def _unigram_without_words() -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.Unigram())
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return _trained(raw, trainers.UnigramTrainer, unk_token="<unk>")


def _bert() -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=400, show_progress=False, special_tokens=["[UNK]"])
    )
    return raw


def _words() -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    raw.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator(CORPUS, trainers.WordLevelTrainer(show_progress=False, special_tokens=["[UNK]"]))
    return raw


def _added(**flags: bool) -> Callable[[], tokenizers.Tokenizer]:
    def make() -> tokenizers.Tokenizer:
        raw = _byte_level()
        contents = ["<|turn|>", "  ", "gull", "<mask of three words>", "a\u0301"]
        raw.add_tokens([tokenizers.AddedToken(content, **flags) for content in contents])
        return raw

    return make


def _whole() -> tokenizers.Tokenizer:
    """No words, and merges that join anything: nothing can be cut."""
    raw = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    return raw


KINDS: dict[str, Callable[[], Tokenizer | tokenizers.Tokenizer]] = {
    "bytes": ByteTokenizer,
    "own bpe": lambda: train_bpe(CORPUS, 400),
    "gpt-2 with a space first": lambda: _byte_level(add_prefix_space=True),
    "llama 3": lambda: _byte_level([_split(LLAMA_3)], ignore_merges=True),
    "qwen": lambda: _byte_level([_split(QWEN)], normalizers.NFC()),
    "gpt-4o": lambda: _byte_level([_split(GPT_4O)]),
    "bytes without words": lambda: _byte_level([_split(r"\n\n\n\n\n\n\n")]),
    "deepseek": _deepseek,
    "falcon": _falcon,
    "bloom": _bloom,
    "digits from the right": _digits_from_the_right,
    "phrases": lambda: _byte_level([_split(r"tide comes in|\S|\s")]),
    "fixed length": lambda: _byte_level([pre_tokenizers.FixedLength(7)]),
    "lines": lambda: _byte_level([pre_tokenizers.CharDelimiterSplit("\n")]),
    "scripts": lambda: _byte_level([pre_tokenizers.UnicodeScripts(), pre_tokenizers.Digits(True)]),
    "llama 2": _llama_2,
    "gemma": _gemma,
    "metaspace first": _metaspace("first", True),
    "metaspace always": _metaspace("always", True),
    "metaspace without words": _metaspace("first", False),
    "unigram": _unigram,
    "unigram without words": _unigram_without_words,
    "bert": _bert,
    "words": _words,
    "added": _added(),
    "added, normalized": _added(normalized=True),
    "added, with space on the left": _added(lstrip=True, normalized=False),
    "added, with space on the right": _added(rstrip=True, normalized=False),
    "added, single words": _added(single_word=True),
    "nothing can be cut": _whole,
}
FRAGMENTS = [
    *(
        "the",
        " tide",
        "gull",
        "They",
        "don",
        "'t",
        "'",
        "re",
        "'RE",
        "x",
        "A",
        "ABC",
        "aB",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\r",
    ),
    *(
        "1",
        "12",
        "999",
        ".",
        ",",
        ", ",
        "...",
        "—",
        "“",
        "é",
        "e\u0301",
        "\u0301",
        "\u0323",
        "\u0338",
        "日",
        "本語",
        "は海",
        "한",
        "\u1100\u1161",
    ),
    *(
        "🦊",
        "👩‍👩‍👧",
        "🇩🇪",
        "▁",
        "<s>",
        "<|turn|>",
        "<|tu",
        "rn|>",
        "<mask of",
        " three words>",
        "ﬁ",
        "½",
        "\u00a0",
        "\u200d",
        "\0",
        "ß",
        "aaaa",
    ),
    *(
        "def depth(x):\n    return x\n",
        "The tide comes in. ",
        "1234567",
        "234567",
        "tide comes in",
        "        ",
        "\n\n\n",
        "/",
        "(",
        "[.,",
        "İ",
        "م",
        "\ufeff",
    ),
]


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """The tokenizer of that kind, made once."""
    made = KINDS[kind]()
    return made if isinstance(made, Tokenizer) else HuggingFaceTokenizer(made)


def hard_text(draw: Random, length: int) -> str:
    """A text of about `length` characters: prose, runs of one thing, and anything between."""
    text = ""
    while len(text) < length:
        match draw.randrange(4):
            case 0:
                text += draw.choice(FRAGMENTS) * draw.choice([1, 1, 2, 5, 40, 400])
            case 1:
                text += draw.choice(CORPUS)[: draw.randrange(300)]
            case _:
                text += "".join(draw.choices(FRAGMENTS, k=draw.randrange(1, 60)))
    return text
