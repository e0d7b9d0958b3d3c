"""Token arrays as the official code publishes them: Zarr arrays /train and /val of one store, streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zarr.codecs

from longread.cli import main
from longread.config import UserError
from longread.data import Sampler, TokenDataset, prepare, sources as sources_module
from longread.data.sources import TokenArray

BOS, V = 9, 70_000
CHUNK = 25


def stream(count: int, seed: int = 0) -> np.ndarray:
    """Documents of 3 to 17 tokens, BOS in front of each; every id is above 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(10, V, count)
    tokens[np.cumsum(rng.integers(3, 18, count))[: count // 20]] = BOS
    tokens[0] = BOS
    return tokens


def write_store(directory: Path, *, zarr_format: int = 3, dtype: str = "uint32", **arrays: np.ndarray) -> Path:
    """As the official loader opens it: blosc with zstd; the published arrays are of format 3."""
    group = zarr.open_group(str(directory), mode="w", zarr_format=zarr_format)
    blosc: Any = zarr.codecs.BloscCodec(cname="zstd", clevel=3, shuffle="shuffle")
    if zarr_format == 2:
        import numcodecs

        blosc = numcodecs.Blosc(cname="zstd", clevel=3)
    for name, tokens in arrays.items():
        group.create_array(name, data=tokens.astype(dtype), chunks=(CHUNK,), compressors=blosc)
    return directory


def official_samples(tokens: np.ndarray, length: int) -> list[np.ndarray]:
    """The loader's sample i is tokens i · T up to and with (i + 1) · T, for i up to (n - 1) // T."""
    return [tokens[i * length : (i + 1) * length + 1] for i in range((len(tokens) - 1) // length)]


@pytest.mark.parametrize(("zarr_format", "dtype"), [(3, "uint32"), (3, "int32"), (2, "uint32"), (3, "uint16")])
def test_a_store_becomes_a_data_set_and_its_held_out_part(zarr_format: int, dtype: str, tmp_path: Path) -> None:
    train, val = stream(203), stream(90, seed=1)
    if dtype == "uint16":
        train, val = train % 60_000 + 1, val % 60_000 + 1
    store = write_store(tmp_path / "data.zarr", zarr_format=zarr_format, dtype=dtype, train=train, val=val)
    common = ["--vocab-size", str(V), "--bos-id", str(BOS), "--documents", "join", "--quiet"]
    assert main(["prepare", f"{store}/train", "--out", f"{tmp_path}/data", *common]) == 0
    assert main(["prepare", f"{store}/val", "--out", f"{tmp_path}/data/validation", *common]) == 0
    data = TokenDataset.open(tmp_path / "data")
    assert data.tokens(0, len(train)).tolist() == train.tolist()
    assert (data.vocab_size, data.bos_id, data.num_documents) == (V, BOS, max(1, (train == BOS).sum()))
    assert data.validation is not None
    assert data.validation.tokens(0, len(val)).tolist() == val.tolist()


@pytest.mark.parametrize("length", [1, 7, CHUNK, 60, 202])
@pytest.mark.parametrize("block", [4, 1000])
def test_stretches_are_the_samples_of_the_official_loader(
    length: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "ARRAY_BLOCK", block)
    tokens = stream(203)
    store = write_store(tmp_path / "data.zarr", train=tokens)
    data = prepare([store / "train"], tmp_path / "data", None, vocab_size=V, bos_id=BOS, stretch=length)
    samples = official_samples(tokens, length)
    assert [data.document(i).tolist() for i in range(data.num_documents)] == [sample.tolist() for sample in samples]

    # In training each epoch sees each sample once, with the official mask.
    sampler = Sampler(data, length, batch_size=1, seed=3)
    assert sampler.num_windows == len(samples)
    seen = []
    for step in range(len(samples)):
        batch = sampler.batch(step)
        seen.append([*batch.input_ids[0].tolist(), batch.target_ids[0, -1].item()])
        assert batch.loss_mask[0].tolist() == (batch.target_ids[0] != BOS).tolist()
    assert sorted(seen) == sorted(sample.tolist() for sample in samples)


@pytest.mark.parametrize("cut", [None, 10])
def test_a_chunk_is_read_once_however_large_it_is(
    cut: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk of the published arrays has 100 million tokens; reading a part of one decodes it all."""
    monkeypatch.setattr(sources_module, "ARRAY_BLOCK", 4)
    store = write_store(tmp_path / "data.zarr", train=stream(203))
    array = TokenArray(str(store / "train"))
    read = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

        def __getitem__(self, part: slice) -> Any:
            read.append(part.start)
            return whole[part]

    whole, array._array = array._array, Counting()
    runs = list(array.stretches(cut) if cut else array.runs(BOS))
    assert len(runs) > 20
    assert read == list(range(0, 203, CHUNK))


def test_chunks_that_were_not_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Zarr reads a chunk that is not there as zeros."""
    tokens = stream(203)
    store = write_store(tmp_path / "data.zarr", train=tokens)
    (store / "train" / "c" / "3").unlink()
    command = ["prepare", f"{store}/train", "--out", f"{tmp_path}/data", "--vocab-size", str(V), "--quiet"]
    assert main(command) == 2
    lacks = "lacks its chunk c/3, from token 75 on; copy it again, or read only the first 75 with array_tokens"
    assert lacks in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
    assert main([*command, "--array-tokens", "75"]) == 0
    assert TokenDataset.open(tmp_path / "data").tokens(0, 75).tolist() == tokens[:75].tolist()
    assert prepare([store / "train"], tmp_path / "largest", None, array_tokens=30).vocab_size == tokens[:30].max() + 1


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("left", [0, 10, 20, -1])
def test_a_chunk_that_is_cut_short(zarr_format: int, left: int, tmp_path: Path) -> None:
    """The decoder of blosc does not notice: it makes numbers of whatever lies behind in memory."""
    store = write_store(tmp_path / "data.zarr", zarr_format=zarr_format, train=stream(203))
    key = "c/3" if zarr_format == 3 else "3"
    chunk = store / "train" / key
    chunk.write_bytes(chunk.read_bytes()[:left])
    with pytest.raises(UserError, match=rf"/train at token 75: it has \d+ bytes .* \d+; copy {key} again"):
        prepare([store / "train"], tmp_path / "data", None, vocab_size=V)
    assert [path.name for path in tmp_path.iterdir()] == ["data.zarr"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stretch": 0}, "stretch is 0; it must be at least 1"),
        ({"stretch": 203}, "has 203 tokens and a stretch of 203 needs 204; cut it shorter"),
        ({"array_tokens": 1}, "array_tokens is 1; it must be at least 2"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, int], reason: str, tmp_path: Path) -> None:
    store = write_store(tmp_path / "data.zarr", train=stream(203))
    with pytest.raises(UserError, match=reason):
        prepare([store / "train"], tmp_path / "data", None, vocab_size=V, **options)  # type: ignore[arg-type]


def test_what_is_for_arrays_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a text")
    for option in ("--stretch", "--array-tokens"):
        assert main(["prepare", f"{tmp_path}/a.txt", "--out", f"{tmp_path}/data", option, "5"]) == 2
        assert "is 5, but no source is a token array; leave it out" in capsys.readouterr().err
    store = write_store(tmp_path / "data.zarr", train=stream(203), val=stream(30))
    assert main(["prepare", str(store), "--out", f"{tmp_path}/data"]) == 2
    assert f"name one of them, for example {store}/train, {store}/val" in capsys.readouterr().err
    named = ["--vocab-size", "300", "--tokenizer", "some/tokenizer.json"]
    assert main(["prepare", f"{store}/train", "--out", f"{tmp_path}/data", *named]) == 2
    assert "--tokenizer some/tokenizer.json has its own; leave out one of the two" in capsys.readouterr().err
