"""From logits to a token, with the numbers written out: limits of the settings, penalty, and what can be drawn."""

from __future__ import annotations

import hashlib
import inspect
import math

import pytest
import torch

from longread.config import UserError
from longread.ops.likeliest import likeliest
from longread.session import Sampling, Session, sampling
from longread.session.sampling import choose, derived_seed, draw, probabilities, seeded
from tests.tiny import INNER, M, make, text

LARGEST = 2**64 - 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": 1, "temperature": 0.0},
        {"max_tokens": 1, "top_p": 1.0},
        {"max_tokens": 1, "top_k": 1},
        {"max_tokens": 1, "seed": LARGEST},
        {"max_tokens": 1, "seed": -(2**63)},
        {"logprobs": 0},
    ],
    ids=str,
)
def test_the_limits_themselves_are_allowed(options: dict) -> None:
    Sampling(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1},
        {"temperature": -1e-9},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.0 + 1e-9},
        {"top_k": 0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"seed": LARGEST + 1},
        {"seed": -(2**63) - 1},
        {"logprobs": -1},
        *({name: math.nan} for name in ("temperature", "top_p", "repetition_penalty")),
    ],
    ids=str,
)
def test_what_is_just_beyond_is_refused(options: dict) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"^{name} is {value}; it must"):
        Sampling(**options)


def test_unless_told_otherwise_the_distribution_is_the_model_s() -> None:
    for function in (Sampling, Session.generate, Session.write):
        defaults = {name: given.default for name, given in inspect.signature(function).parameters.items()}
        assert [defaults[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")] == [
            1.0,
            1.0,
            None,
            1.0,
            None,
        ]


@pytest.mark.parametrize("seed", [0, 1, 100, 2**32 - 1])
def test_a_seed_of_32_bits_is_pytorch_s_own(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(seeded(seed, torch.device("cpu")).get_state(), generator.get_state())


@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 100, LARGEST])
def test_a_longer_seed_is_not_cut_to_its_lowest_bits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**32)
    found = seeded(seed, torch.device("cpu"))
    assert not torch.equal(found.get_state(), generator.get_state())
    assert torch.equal(found.get_state(), seeded(seed, torch.device("cpu")).get_state())
    assert found.initial_seed() < 2**32


def test_seeds_of_several_draws_are_what_they_were() -> None:
    """Else a command that was noted down would draw something else."""
    assert derived_seed(7, 0) == 7
    digest = int.from_bytes(hashlib.sha256(b"(7, 1)").digest())
    assert derived_seed(7, 1) == digest >> (256 - 63)
    assert seeded(-1, torch.device("cpu")).initial_seed() == int.from_bytes(hashlib.sha256(b"(-1,)").digest()[:4])


def test_all_tokens_can_be_drawn_where_all_probability_is_asked_for() -> None:
    """Also those so unlikely that the sum of the others is rounded to 1."""
    found = probabilities(torch.tensor([[30.0, 0.0, -1.0]]), Sampling(), [[]])
    assert (found > 0).all()


def test_a_penalty_makes_the_recent_less_likely_whatever_their_sign() -> None:
    logits = torch.tensor([[4.0, -4.0, 0.0, 3.0, -math.inf, 0.5]]).repeat(2, 1)
    found = probabilities(logits, Sampling(repetition_penalty=2.0), [[0, 1, 2, 4, 5, 0], []])
    expected = torch.stack((torch.tensor([2.0, -8.0, 0.0, 3.0, -math.inf, 0.25]), logits[1])).softmax(1)
    torch.testing.assert_close(found, expected)
    assert logits[0, 0] == 4.0  # what was given is as it was
    as_tensor = probabilities(logits[:1], Sampling(repetition_penalty=2.0), torch.tensor([[0, 1, 2, 4, 5, 0]]))
    assert torch.equal(as_tensor, found[:1])


def test_settings_beyond_the_range_of_the_logits_are_as_good_as_its_ends() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    for extreme in (1e-300, 1e300):
        found = probabilities(logits, Sampling(repetition_penalty=extreme), [[0, 1, 2]])
        assert found.isfinite().all()
        assert found.argmax() == (0 if extreme < 1 else 3)
        found = probabilities(logits, Sampling(temperature=extreme), [[]])
        assert found.tolist() == ([[0.0, 0.0, 0.0, 1.0]] if extreme < 1 else [[0.25] * 4])


def test_everything_is_computed_where_the_logits_are() -> None:
    sampling = Sampling(repetition_penalty=2.0, top_k=2, top_p=0.5)
    assert probabilities(torch.empty(1, 6, device="meta"), sampling, [[1, 3]]).device.type == "meta"


ROWS = [
    {"seed": 1},
    {"temperature": 0.0},
    {"seed": 2, "temperature": 0.3, "top_k": 5},
    {"temperature": 0.0, "repetition_penalty": 1.7, "logprobs": 2},
    {"seed": 3, "top_p": 0.8, "repetition_penalty": 1.2},
    {"seed": 4, "top_k": 17, "top_p": 0.5, "temperature": 1.8, "logprobs": 4},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_is_drawn_as_it_is_alone(dtype: torch.dtype) -> None:
    """To the last bit, whatever is drawn beside it: 50 rounds, in each of which all generators go on."""
    settings, cpu = [Sampling(**row) for row in ROWS], torch.device("cpu")
    together, alone = ([seeded(s.seed, cpu) if s.seed else torch.Generator() for s in settings] for _ in range(2))
    source = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = 3 * torch.randn(len(ROWS), 97, generator=source, dtype=dtype)
        recent = torch.randint(97, (len(ROWS), 12), generator=source).tolist()
        found = draw(logits, settings, recent, together)
        each = [draw(logits[i : i + 1], [s], [recent[i]], [alone[i]])[0] for i, s in enumerate(settings)]
        assert found == each
        assert [len(one.top) for one in found] == [s.logprobs for s in settings]
        log_p = logits.log_softmax(1).tolist()
        assert [one.logprob for one in found] == [row[one.id] for one, row in zip(found, log_p, strict=True)]


def test_the_last_bits_of_a_kernel_are_there_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "likeliest", lambda x: (likeliest(x)[0], likeliest(x)[1] + 2**-20))
    logits, greedy = torch.randn(3, 97, generator=torch.Generator().manual_seed(0)), Sampling(temperature=0)
    settings, generators = [Sampling(), greedy, Sampling(temperature=0, logprobs=1)], [torch.Generator()] * 3
    (alone,) = draw(logits[1:2], [greedy], [[]], generators[:1])
    assert draw(logits, settings, [[]] * 3, generators)[1] == alone
    assert alone.logprob != logits[1].log_softmax(0).max().item()


def test_likeliest_tokens_and_chances_are_the_model_s() -> None:
    """Before temperature and penalty, and no more of them than there are."""
    p = torch.tensor([[0.2, 0.5, 0.3]])
    sampling = Sampling(temperature=0.0, repetition_penalty=9.0, logprobs=7)
    (drawn,) = draw(p.log() + 5, [sampling], [[1]], [torch.Generator()])
    assert drawn.id == 2
    assert math.exp(drawn.logprob) == pytest.approx(0.3)
    assert [i for i, _ in drawn.top] == [1, 2, 0]
    assert [math.exp(x) for _, x in drawn.top] == pytest.approx([0.5, 0.3, 0.2])


def test_a_large_penalty_silences_what_was_just_written() -> None:
    """With logits above 0, what has been written in the last window is never written again."""
    model = make(window_size=6)
    with torch.no_grad():
        model.embedding.weight.zero_()  # all logits are 0 …
    session = Session(model, INNER, learn=False)
    session.read([1])
    logits = session.model.logits
    session.model.logits = lambda output: logits(output) + 5.0  # type: ignore[method-assign]
    written = list(session.generate(18, temperature=0, repetition_penalty=2.0))
    for i, token in enumerate(written):
        assert token not in [1, *written][max(0, i + 1 - 6) : i + 1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.2, 0.4, 0.1, 0.3]),
        ({"temperature": 0.0}, [0.0, 1.0, 0.0, 0.0]),
        ({"temperature": 0.5}, [4 / 30, 16 / 30, 1 / 30, 9 / 30]),
        ({"top_k": 3}, [2 / 9, 4 / 9, 0.0, 3 / 9]),
        ({"top_k": 1}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 0.65}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ({"top_p": 0.75}, [2 / 9, 4 / 9, 0.0, 3 / 9]),
        ({"top_p": 0.39}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 0.5, "top_k": 3}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ({"top_p": 0.5, "temperature": 0.5}, [0.0, 1.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_what_can_be_drawn(options: dict, expected: list[float]) -> None:
    """Of two rows, the second the first turned round: as `probabilities` says, and as `choose` draws."""
    p = torch.tensor([[0.2, 0.4, 0.1, 0.3], [0.3, 0.1, 0.4, 0.2]], dtype=torch.float64)
    sampling = Sampling(**options)
    wanted = torch.tensor([expected, expected[::-1]], dtype=torch.float64)
    found = probabilities(p.log() - 7, sampling, [[], []])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([choose(p[:1].log(), [sampling], [[]], [generator]) for _ in range(400)])
    assert drawn.unique().tolist() == wanted[0].nonzero().flatten().tolist()
    assert (drawn.bincount(minlength=4) / 400 - wanted[0]).abs().max() < 0.1


def test_of_equals_the_first_are_kept() -> None:
    """Half of eight exact binary shares is reached with the fourth, and the fifth is not needed."""
    logits = torch.zeros(1, 8)
    assert probabilities(logits, Sampling(top_p=0.5), [[]])[0].tolist() == [0.25] * 4 + [0.0] * 4
    assert probabilities(logits, Sampling(top_k=2), [[]])[0].tolist() == [0.5] * 2 + [0.0] * 6
    many = torch.zeros(1, 4096)
    assert probabilities(many, Sampling(top_k=3), [[]])[0].nonzero().flatten().tolist() == [0, 1, 2]


def test_the_penalty_looks_at_what_it_wrote_itself_too() -> None:
    """The newest tokens are at most a window of them, whether they were read or written."""
    session = Session(make(), INNER)
    session.read(text(3))
    written = list(session.generate(2, seed=0))
    assert session.recent == text(3) + written
    written += session.generate(M + 3, seed=1)
    assert session.recent == (text(3) + written)[-6:]


def test_without_top_p_nothing_is_cut_off() -> None:
    """Although in float32 the first has all the probability there is."""
    found = probabilities(torch.tensor([[1.0, 1e-12, 1e-12]]).log(), Sampling(), [[]])
    assert found[0].tolist() == pytest.approx([1.0, 1e-12, 1e-12])
