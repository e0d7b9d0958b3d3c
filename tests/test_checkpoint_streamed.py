"""A model directory written parameter by parameter is the one that is written at once, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longread.checkpoint import load_model, save_model
from longread.checkpoint.load import describe_model
from longread.checkpoint.streamed import ParameterSpec, save_streamed, stream_safetensors
from longread.model import Transformer, fingerprint_of
from tests.tiny import INNER, make

FILES = ("model.safetensors", "config.json")


def mixed() -> Transformer:
    """Matrices in bfloat16, and gains that were kept wider: one in float32, one in float64."""
    model = make(3).bfloat16()
    model.final_norm.weight.data = torch.linspace(0, 2, 16)
    model.blocks[0].static_mlp.pre_norm.weight.data = torch.linspace(0, 1, 16, dtype=torch.float64)
    return model


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, ParameterSpec]:
    return {name: ParameterSpec(tuple(x.shape), x.dtype) for name, x in tensors.items()}


class OnceEach(Mapping[str, Tensor]):
    """Parameters that notice who asks twice."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.left = dict(tensors)
        self.names = list(tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Tensor:
        return self.left.pop(name)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_the_files_are_those_of_a_model_saved_at_once(order: int, learns: bool, tmp_path: Path) -> None:
    """In whatever order the parameters come; their own graph does not matter."""
    model = mixed()
    given = OnceEach(dict([*model.named_parameters()][::order]))
    found = save_streamed(
        tmp_path / "m", model.config, layout_of(model.state_dict()), given, INNER, "abc", {"a": 1}, learns=learns
    )
    save_model(tmp_path / "at once", model, INNER, "abc", {"a": 1}, learns=learns)
    assert found == fingerprint_of(model)
    assert not given.left
    assert [(tmp_path / "m" / name).read_bytes() for name in FILES] == [
        (tmp_path / "at once" / name).read_bytes() for name in FILES
    ]
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in load_model(tmp_path / "m").model.state_dict().items())


def test_what_was_not_trained_to_learn_is_kept_with_the_model(tmp_path: Path) -> None:
    model = make()
    save_streamed(tmp_path / "streamed", model.config, layout_of(model.state_dict()), model.state_dict(), INNER, None)
    save_model(tmp_path / "learns", model, INNER, None)
    save_model(tmp_path / "does not", model, INNER, None, learns=False)
    for name, learns in (("streamed", True), ("learns", True), ("does not", False)):
        assert load_model(tmp_path / name).learns is describe_model(tmp_path / name).learns is learns
        assert ("learns" in json.loads((tmp_path / name / "config.json").read_text())) is not learns


def test_a_parameter_that_is_another_leaves_the_model_that_was_there(tmp_path: Path) -> None:
    model = make()
    layout = layout_of(model.state_dict())
    save_streamed(tmp_path / "m", model.config, layout, model.state_dict(), INNER, None)
    before = [(tmp_path / "m" / name).read_bytes() for name in FILES]
    for wrong in (torch.zeros(17), torch.zeros(16, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"final_norm\.weight is .* of torch\.float.*, not ParameterSpec"):
            save_streamed(
                tmp_path / "m", model.config, layout, model.state_dict() | {"final_norm.weight": wrong}, INNER, None
            )
        assert [(tmp_path / "m" / name).read_bytes() for name in FILES] == before
        assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("note", ["", "a", "ab", "abcdefg"])
def test_a_header_of_any_length_is_aligned(note: str, tmp_path: Path) -> None:
    """As the format asks: tensors begin at a multiple of 8 bytes, the widest first, and follow each other."""
    tensors = {"a": torch.arange(3, dtype=torch.float16), "b": torch.tensor(2.5, dtype=torch.float64)}
    tensors["c"] = torch.arange(6, dtype=torch.float32).reshape(3, 2).t()
    stream_safetensors(tmp_path / "file", layout_of(tensors), tensors, {"note": note})
    whole = (tmp_path / "file").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    assert length % 8 == 0
    header = json.loads(whole[8 : 8 + length])
    assert {name: header[name]["data_offsets"] for name in tensors} == {"b": [0, 8], "c": [8, 32], "a": [32, 38]}
    assert header["__metadata__"] == {"note": note}
    assert len(whole) == 8 + length + 38
    assert all(torch.equal(x, tensors[name]) for name, x in load_file(tmp_path / "file").items())


@pytest.mark.parametrize(
    ("asked", "gains"),
    [
        (None, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_gains_that_were_kept_wider_are_not_narrowed(
    asked: torch.dtype | None, gains: torch.dtype, tmp_path: Path
) -> None:
    model = make().bfloat16()
    model.final_norm.weight.data = torch.linspace(0, 2, 16)
    save_model(tmp_path / "m", model, INNER, None)
    loaded = load_model(tmp_path / "m", dtype=asked).model
    assert loaded.final_norm.weight.dtype == gains
    others = {x.dtype for name, x in loaded.named_parameters() if name != "final_norm.weight"}
    assert others == {asked or torch.bfloat16}
