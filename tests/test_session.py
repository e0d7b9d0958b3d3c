"""A session: reading, writing, forking, and surviving on a disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from longread.config import UserError
from longread.session import Session
from longread.session.sampling import derived_seed, seeded
from tests.tiny import INNER, M, make, text


def after(n: int, **changes: object) -> Session:
    session = Session(make(**changes), INNER)
    session.read(text(n))
    return session


def test_reading_gives_the_loss_of_every_token_and_learns() -> None:
    session = Session(make(), INNER)
    assert session.drift() == 0.0
    nll = session.read(text(3 * M + 1))
    assert nll.shape == (3 * M + 1,)
    assert math.isnan(nll[0])
    assert (nll[1:] > 0).all()
    assert session.position == 3 * M + 1
    assert session.drift() > 0
    assert session.inner_grad_norms.shape == (3,)
    assert (session.inner_grad_norms > 0).all()


def test_a_frozen_reader_does_not_learn() -> None:
    session = Session(make(), INNER, learn=False)
    session.read(text(3 * M + 1))
    assert session.drift() == 0.0
    assert session.inner_grad_norms.shape == (0,)


def test_a_model_without_fast_weights_reads_too() -> None:
    session = after(20, num_suffix_blocks=0)
    assert session.drift() == 0.0
    assert len(list(session.generate(3, seed=0))) == 3


def test_writing_is_reading_what_one_writes() -> None:
    """Every split around the mini-batch's end: generated tokens fill it and its step fires in the same place."""
    for n in (1, M - 1, M, M + 1, 2 * M):
        session, reader = (Session(make().double(), INNER) for _ in range(2))
        session.read(text(n))
        written = list(session.generate(2 * M + 1, seed=5))
        reader.read(text(n) + written)
        assert reader.position == session.position
        for a, b in zip(session.state.tensors, reader.state.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_what_it_writes_need_not_be_learned() -> None:
    session, reader = (Session(make().double(), INNER) for _ in range(2))
    session.read(text(2 * M + 3))
    drift = session.drift()
    written = list(session.generate(2 * M + 1, seed=5, learn=False))
    assert session.drift() == drift > 0
    assert session.learn
    reader.read(text(2 * M + 3))
    reader.learn = False
    reader.read(written)
    reader.learn = True
    for follower in (session, reader):
        follower.read(text(2 * M))
    assert session.drift() == pytest.approx(reader.drift(), rel=1e-9) != drift


def test_the_same_seed_writes_the_same() -> None:
    session = after(9)
    one, two, other = (list(session.fork().generate(20, seed=seed)) for seed in (1, 1, 2))
    assert one == two
    assert one != other
    assert list(session.fork().generate(20)) != list(session.fork().generate(20))


def test_greedy_takes_the_likeliest() -> None:
    session = after(9)
    logits = session.model.logits(session.state.output)[0]
    assert next(session.fork().generate(1, temperature=0)) == logits.argmax().item()
    assert next(session.fork().generate(1, top_k=1)) == logits.argmax().item()
    assert next(session.fork().generate(1, top_p=1e-6)) == logits.argmax().item()


def frequencies(session: Session, draws: int = 300, **options: float) -> torch.Tensor:
    counts = torch.zeros(19)
    for seed in range(draws):
        counts[next(session.fork().generate(1, seed=seed, **options))] += 1  # type: ignore[arg-type]
    return counts / draws


def test_tokens_are_drawn_from_the_distribution_asked_for() -> None:
    session = after(9, num_blocks=1, num_suffix_blocks=1)
    logits = session.model.logits(session.state.output)[0].detach()
    p = (logits / 0.7).softmax(-1)
    assert (frequencies(session, temperature=0.7) - p).abs().max() < 0.07
    kept = torch.zeros(19)
    kept[p.topk(3).indices] = p.topk(3).values
    assert (frequencies(session, temperature=0.7, top_k=3) - kept / kept.sum()).abs().max() < 0.07
    order = p.argsort(descending=True)
    inside = order[: int((p[order].cumsum(0) < 0.5).sum()) + 1]
    kept = torch.zeros(19)
    kept[inside] = p[inside]
    assert (frequencies(session, temperature=0.7, top_p=0.5) - kept / kept.sum()).abs().max() < 0.07


def test_seeds_differ_in_all_their_bits() -> None:
    """PyTorch's generator on the CPU looks at 32 of them."""
    seeds = [0, 1, 2**32, 2**32 + 1, 2**40, 2**63, -1, -(2**63), 2**64 - 1]
    draws = [tuple(torch.rand(3, generator=seeded(seed, torch.device("cpu"))).tolist()) for seed in seeds]
    assert len(set(draws)) == len(seeds)
    assert torch.equal(torch.tensor(draws[1]), torch.rand(3, generator=torch.Generator().manual_seed(1)))
    assert len({derived_seed(seed, i) for seed in seeds for i in range(50)}) == 50 * len(seeds)


@pytest.mark.parametrize("options", [{"temperature": 1e-310}, {"temperature": 1e-40}, {"repetition_penalty": 1e-300}])
def test_extreme_settings_do_not_overflow(options: dict) -> None:
    assert len(list(after(9).generate(3, **options))) == 3
    if "temperature" in options:
        assert list(after(9).generate(3, **options)) == list(after(9).generate(3, temperature=0))


def test_the_repetition_penalty_looks_at_the_window() -> None:
    session = after(30, num_blocks=1, num_suffix_blocks=1)
    recent = set(text(30)[-6:])
    free = frequencies(session, 200)
    penalised = frequencies(session, 200, repetition_penalty=1000.0)
    seen = torch.tensor([token in recent for token in range(19)])
    positive = session.model.logits(session.state.output)[0] > 0
    assert penalised[seen & ~positive].sum() < free[seen & ~positive].sum()
    assert penalised[~seen].sum() != free[~seen].sum()


def test_a_stop_token_ends_the_text_unread() -> None:
    session = after(9)
    written = list(session.fork().generate(30, seed=3))
    stop = written[5]
    stopped = session.fork()
    assert list(stopped.generate(30, seed=3, stop_ids={stop})) == written[: written.index(stop)]
    assert stopped.position == 9 + written.index(stop)


def test_forks_go_their_own_ways() -> None:
    session = after(10)
    fork = session.fork()
    expected = session.fork().read(text(10, seed=1))
    fork.read(text(13, seed=2))
    assert session.position == 10
    assert torch.equal(session.read(text(10, seed=1)), expected)


@pytest.mark.parametrize("n", [0, 1, M, M + 2, 5 * M + 3])
@pytest.mark.parametrize("changes", [{}, {"attention": "full"}, {"num_suffix_blocks": 0}], ids=str)
def test_a_restored_session_goes_on_bit_for_bit(n: int, changes: dict, tmp_path: Path) -> None:
    session = Session(make(**changes), INNER)
    session.read(text(n))
    session.save(tmp_path / "s.safetensors")
    restored = Session.restore(tmp_path / "s.safetensors", make(**changes))
    assert restored.position == session.position
    assert restored.drift() == session.drift()
    assert torch.equal(restored.read(text(11, seed=1)).nan_to_num(), session.read(text(11, seed=1)).nan_to_num())
    options = {"max_tokens": 9, "seed": 4, "repetition_penalty": 1.3}
    assert list(restored.generate(**options)) == list(session.generate(**options))


def test_a_saved_session_has_one_size_at_any_length(tmp_path: Path) -> None:
    sizes = set()
    session = Session(make(), INNER)
    for i in range(3):
        session.read(text(64 * M, seed=i))
        session.save(tmp_path / "s")
        sizes.add((session.nbytes, len(Session.restore(tmp_path / "s", make()).state.tensors)))
    assert len(sizes) == 1


def test_a_session_belongs_to_its_model(tmp_path: Path) -> None:
    after(9).save(tmp_path / "s")
    with pytest.raises(UserError, match="belongs to another model; give the model that read it"):
        Session.restore(tmp_path / "s", make(seed=1))


@pytest.mark.parametrize("n", [0, 9, 14])
def test_a_session_goes_on_in_another_type_of_products(n: int, tmp_path: Path) -> None:
    """As when one that was saved on a CPU is restored on a GPU."""
    session = after(n)
    session.save(tmp_path / "s")
    half = make()
    half.compute_dtype = torch.bfloat16
    restored = Session.restore(tmp_path / "s", half)
    assert torch.allclose(restored.read(text(20, 1)), session.read(text(20, 1)), atol=0.1, equal_nan=True)
    assert {x.dtype for x in restored.state.tensors if x.is_floating_point()} == {torch.bfloat16, torch.float32}
    restored.save(tmp_path / "s")
    assert Session.restore(tmp_path / "s", make()).state.hidden.dtype == torch.float32


def test_a_damaged_session_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    after(9).save(path)
    whole = path.read_bytes()
    for damaged, reason in (
        (whole[:-9], "truncated"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "damaged"),
        (b"hello", "truncated|no safetensors"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=reason):
            Session.restore(path, make())


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = after(9)
    session.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    session.read(text(5))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        session.save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_token_outside_the_vocabulary_is_refused_before_anything_is_read() -> None:
    session = after(9)
    for wrong in (19, -1):
        with pytest.raises(UserError, match=f"token id {wrong} is not in the vocabulary of 19"):
            session.read([1, 2, wrong])
    assert session.position == 9


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_tokens": -3}, "max_tokens is -3"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        after(9).generate(**{"max_tokens": 5} | options)


def test_nothing_cannot_be_continued() -> None:
    with pytest.raises(UserError, match="nothing to continue"):
        Session(make(), INNER).generate(5)


def test_a_session_says_what_it_is_and_goes_on() -> None:
    """To look at it while it writes ends nothing, and takes no turn from another session that writes with the model."""
    model = make().double()
    sessions, alone = [Session(model, INNER) for _ in range(2)], Session(make().double(), INNER)
    size = f"{sessions[0].nbytes / 2**20:.1f} MiB"
    assert repr(sessions[0]) == f"<Session: 0 tokens read, 0 inner steps, drift 0.000, {size}, learning, on cpu>"
    for session in (*sessions, alone):
        session.read(text(3 * M + 1))
    expected = list(alone.generate(M, seed=5))
    texts = [session.generate(M, seed=5) for session in sessions]
    for i, token in enumerate(expected):
        assert [next(written) for written in texts] == [token, token]
        said = {repr(session) for session in sessions}
        assert len(said) == 1
        assert said.pop().startswith(
            f"<Session: {3 * M + 2 + i} tokens read, {sessions[0].steps} inner steps, drift 0."
        )
    drift = f"drift {sessions[0].drift():.3f}, "
    sessions[0].learn = False
    assert drift in repr(sessions[0])
    assert repr(sessions[0]).endswith("MiB, frozen, on cpu>")
    assert "drift 0.000" in repr(after(9, num_suffix_blocks=0))


def test_a_session_that_refused_a_step_says_so() -> None:
    session = Session(make(), INNER)
    session.read(text(9))
    session._counted(0, 2)
    assert " inner steps, 2 rolled back, drift" in repr(session)
