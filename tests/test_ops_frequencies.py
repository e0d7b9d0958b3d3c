"""Angles of the rotary embedding, also where the context was stretched: by hand, and as Transformers computes them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from longread.config import RopeScaling
from longread.ops.rotary import Scaling, frequencies, rotate, rotation, yarn_attention_factor

D64 = torch.float64


def close(actual: torch.Tensor, expected: list[float] | torch.Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=D64), rtol=rtol, atol=0)


def test_plain_frequencies_and_rotation() -> None:
    """Pair i of H turns by base^(−2i / H) a token."""
    angles = frequencies(8, 1e4)
    close(angles, [1, 0.1, 0.01, 0.001])
    rotary = rotation(3, 2, angles, torch.empty(0, dtype=D64))
    close(rotary.real, [[math.cos(p * a) for a in angles.tolist()] for p in (3, 4)])
    close(rotary.imag, [[math.sin(p * a) for a in angles.tolist()] for p in (3, 4)])


def test_positions_are_exact_far_out() -> None:
    x = torch.tensor([[1.0, 0.0]])
    turned = rotate(x, rotation(10**7, 1, frequencies(2, 1e4), x))
    torch.testing.assert_close(turned, torch.tensor([[math.cos(1e7), math.sin(1e7)]]))


def test_linear() -> None:
    close(frequencies(8, 1e4, Scaling("linear", 4)), [0.25, 0.025, 0.0025, 0.00025])


def test_llama3_by_hand() -> None:
    """In 2000π tokens the pairs turn 1000, 100, 10, 1, .1 times; low 2 and high 14 put the third a third of the way."""
    context = 6283
    scaling = Scaling("llama3", 8, context, low_freq_factor=2, high_freq_factor=14)
    kept = (0.01 * context / (2 * math.pi) - 2) / 12
    expected = [1, 0.1, 0.01 * (kept + (1 - kept) / 8), 0.001 / 8, 0.0001 / 8]
    close(frequencies(10, 1e5, scaling), expected)
    assert kept == pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.parametrize(("truncate", "first", "last"), [(True, 1, 4), (False, 1.5, 3.25)])
def test_yarn_by_hand(truncate: bool, first: float, last: float) -> None:
    """Pair i of base 10^(H/2) turns 10^−i a token: 1000 · 10^−1.5 and 1000 · 10^−3.25 times are the borders."""
    context = 6283
    exact = context / (2 * math.pi)
    scaling = Scaling("yarn", 5, context, beta_fast=exact * 10**-1.5, beta_slow=exact * 10**-3.25, truncate=truncate)
    kept = [min(1, max(0, (last - i) / (last - first))) for i in range(6)]
    expected = [10.0**-i * (k + (1 - k) / 5) for i, k in enumerate(kept)]
    assert kept[0] == 1
    assert kept[-1] == 0
    assert 0 < kept[2] < 1
    close(frequencies(12, 1e6, scaling), expected)


def test_yarn_whose_borders_fall_together() -> None:
    """Then it is a step between two pairs, and finite."""
    for context in (2, 4):  # tokens in which not even the first pair turns once
        for truncate in (True, False):
            step = frequencies(8, 1e4, Scaling("yarn", 4, context, truncate=truncate))
            close(step, [1, 0.025, 0.0025, 0.00025])


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_the_context_before_stretching_is_needed(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"original_context is missing; {kind} needs"):
        frequencies(8, 1e4, Scaling(kind, 4))


def test_fields_and_defaults_are_those_of_the_config() -> None:
    given = RopeScaling(kind="yarn", factor=4.0, original_context=64)
    assert Scaling("yarn", 4.0, 64)._asdict() == {name: getattr(given, name) for name in Scaling._fields}
    assert set(Scaling._fields) == set(RopeScaling.__dataclass_fields__)


def test_yarn_attention_factor() -> None:
    assert yarn_attention_factor(1) == 1
    assert yarn_attention_factor(0.5) == 1
    assert yarn_attention_factor(1.5) == pytest.approx(1 + math.log(1.5) / 10)
    assert yarn_attention_factor(math.e**2) == pytest.approx(1.2)
    assert yarn_attention_factor(math.e**2, 0.5, 1.0) == pytest.approx(1.1 / 1.2)
    assert yarn_attention_factor(math.e**2, mscale=0.5) == pytest.approx(1.2)  # one of them alone counts for nothing


TRANSFORMERS: dict[str, tuple[Scaling, float, int, dict[str, Any]]] = {
    "linear": (Scaling("linear", 8.0), 1e4, 64, {"factor": 8.0}),
    "llama3": (  # Llama 3.1 8B
        Scaling("llama3", 8.0, 8192),
        5e5,
        128,
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ),
    "yarn": (  # Qwen2.5 7B beyond 32K
        Scaling("yarn", 4.0, 32768),
        1e6,
        128,
        {"factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn whose borders are not whole": (  # gpt-oss
        Scaling("yarn", 32.0, 4096, truncate=False),
        150_000.0,
        64,
        {
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    ),
    "yarn with two weights": (
        Scaling("yarn", 40.0, 4096, beta_fast=16, beta_slow=2),
        1e4,
        64,
        {
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
        },
    ),
    "yarn over all pairs": (  # the upper border lies above H/2 − 1
        Scaling("yarn", 4.0, 400),
        10.0,
        8,
        {"factor": 4.0, "original_max_position_embeddings": 400},
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_against_transformers(name: str) -> None:
    """Which computes in float32."""
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    scaling, base, H, given = TRANSFORMERS[name]
    config = transformers.LlamaConfig(
        hidden_size=2 * H,
        num_attention_heads=2,
        head_dim=H,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": scaling.kind, "rope_theta": base, **given},
    )
    expected, enlarged = rope.ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu")
    actual = frequencies(H, base, scaling)
    close(actual, expected.double(), rtol=1e-5)
    assert not torch.allclose(actual, frequencies(H, base), rtol=1e-3, atol=0)
    if scaling.kind == "yarn":
        weights = {name: given[name] for name in ("mscale", "mscale_all_dim") if name in given}
        assert yarn_attention_factor(scaling.factor, **weights) == pytest.approx(enlarged)


def test_what_is_kept_can_be_differentiated_whoever_asked_first() -> None:
    with torch.inference_mode():
        first = frequencies(6, 12345.0)
    assert frequencies(6, 12345.0) is first
    assert not first.is_inference()


def test_what_is_kept_is_on_its_device_whoever_asked_first() -> None:
    with torch.device("meta"):
        assert frequencies(6, 54321.0, device="meta").is_meta
        assert frequencies(6, 54321.0, device="cpu").is_cpu
    torch.testing.assert_close(frequencies(6, 54321.0, device="cpu")[0], torch.ones((), dtype=torch.float64))
