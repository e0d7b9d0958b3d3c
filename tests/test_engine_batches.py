"""Sessions computed together give what each gives alone: in float64, for every kind of network and at every border."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from longread.config import InnerConfig, ModelConfig
from longread.engine import Appended, Engine, Limits, Sampling, Token, largest_session
from longread.inner_loop import ReadingState, begin, read
from longread.inner_loop.places import Places
from longread.inner_loop.state import apart, shapes_of, together
from longread.model import Transformer, initialize
from longread.session import Session

M, K, V = 4, 6, 19
INNER = InnerConfig(lr=0.7, clip=0.5)
NETWORKS = {
    "window": {},
    "full": {"attention": "full"},
    "hybrid": {"attention": "hybrid", "num_blocks": 6},
    "static": {"num_suffix_blocks": 0},
    "mamba2": {"mixer": "mamba2", "num_suffix_blocks": 0},
    "gated_deltanet": {"mixer": "gated_deltanet", "num_suffix_blocks": 0},
    "ttt_kvb": {"mixer": "ttt_kvb", "num_suffix_blocks": 0},
}
two_networks = pytest.mark.parametrize(  # fast MLPs behind both kinds of attention, and a recurrence without them
    "changes",
    [
        pytest.param(changes, id=name, marks=() if name in ("hybrid", "gated_deltanet") else pytest.mark.slow)
        for name, changes in NETWORKS.items()
    ],
)


def make(dtype: torch.dtype = torch.float64, **changes: object) -> Transformer:
    fields = {
        "vocab_size": V,
        "width": 16,
        "num_blocks": 4,
        "num_heads": 2,
        "mlp_hidden": 24,
        "window_size": K,
        "mini_batch_size": M,
        "num_suffix_blocks": 2,
    }
    model = Transformer(ModelConfig(**fields | changes)).to(dtype)  # type: ignore[arg-type]
    initialize(model, seed=3)
    return model


def text(n: int, seed: int = 0) -> list[int]:
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def after(model: Transformer, n: int, seed: int) -> ReadingState:
    return read(model, begin(model), torch.tensor([text(n, seed)], device=model.device), inner=INNER).state


def assert_same(one: ReadingState, other: ReadingState) -> None:
    assert one.position == other.position
    for a, b in zip(one.tensors, other.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "n"),
    [
        pytest.param(
            changes,
            n,
            id=f"{name}-{n}",
            marks=() if n > 3 * M or (n == 1 and name in ("hybrid", "gated_deltanet")) else pytest.mark.slow,
        )
        for name, changes in NETWORKS.items()
        for n in (1, M - 1, M, M + 1, 3 * M + 2)
    ],
)
def test_reading_together_is_reading_alone(changes: dict, n: int) -> None:
    """At different positions, wherever what is left of the texts has the same shapes."""
    model = make(**changes)
    groups: dict[object, list[ReadingState]] = {}
    for i, position in enumerate(range(1, 3 * M + 1)):
        state = after(model, position, i)
        groups.setdefault(shapes_of(state), []).append(state)
    if changes.get("attention") == "window":
        assert max(map(len, groups.values())) > 1
    for states in groups.values():
        tokens = torch.tensor([text(n, 100 + i) for i in range(len(states))])
        found = read(model, together(states), tokens, inner=INNER, guard=True, top=3)
        for i, (state, made) in enumerate(zip(states, apart(found.state), strict=True)):
            alone = read(model, state, tokens[i : i + 1], inner=INNER, guard=True, top=3)
            assert_same(made, alone.state)
            torch.testing.assert_close(found.nll[i], alone.nll[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.inner_grad_norm[i], alone.inner_grad_norm[0], rtol=1e-12, atol=1e-12)
            for a, b in zip(found.top or (), alone.top or (), strict=True):
                torch.testing.assert_close(a[i], b[0], rtol=1e-12, atol=1e-12)


def test_what_is_likeliest() -> None:
    model = make()
    tokens = torch.tensor([text(3 * M)])
    found = read(model, begin(model), tokens, inner=INNER, top=V)
    values, ids = found.top or ()
    assert values[0, 0].isnan().all()
    for t in range(1, 3 * M):
        assert values[0, t, ids[0, t] == tokens[0, t]].item() == pytest.approx(-found.nll[0, t].item())
        assert values[0, t].exp().sum().item() == pytest.approx(1)


def test_what_leaves_a_batch_shares_no_memory_with_it() -> None:
    model = make()
    states = [after(model, 3 * M, seed) for seed in range(3)]
    first, second, third = apart(together(states))
    kept = [x.clone() for x in second.tensors]
    for x in (*first.tensors, *third.tensors):
        x.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(second.tensors, kept, strict=True))
    assert {x.untyped_storage().data_ptr() for x in second.tensors if x.numel()}.isdisjoint(
        x.untyped_storage().data_ptr() for state in (first, third) for x in state.tensors
    )
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in second.tensors)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(NETWORKS[name], id=name, marks=() if name in ("hybrid", "static") else pytest.mark.slow)
        for name in ("window", "full", "hybrid", "static")
    ],
)
def test_lanes_are_filled_left_and_moved_at_any_time(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longread.inner_loop.places.SPARE", 5)  # so that room runs out
    model = make(**changes)
    places = Places(model, 3, learn=True)
    positions = (1, 2 * M + 1, 5 * M + 3)
    states = [after(model, position, i) for i, position in enumerate(positions)]
    for lane, state in enumerate(states):
        places.put(lane, state, learn=True)
    where = [0, 1, 2]
    for step in range(3 * M):
        new = torch.tensor(text(3, 50 + step))
        for i in range(3):
            lane = where[i]
            if places.due(lane):
                places.step(lane, new[i : i + 1], INNER)
        tokens = torch.empty(3, dtype=torch.long)
        for i in range(3):
            tokens[where[i]] = new[i]
            states[i] = read(model, states[i], new[i].view(1, 1), inner=INNER).state
        places.read(tokens)
        for i in range(3):
            assert_same(places.take(where[i]), states[i])
            torch.testing.assert_close(places.logits(3)[where[i]], model.logits(states[i].output)[0])
        if step == M:  # the second goes, the last takes its place, another one comes
            places.leave(where[1])
            places.move(2, 1)
            where[1], where[2] = 2, 1
            places.put(2, states[1], learn=True)


@two_networks
@pytest.mark.parametrize("learn", [True, False])
def test_an_engine_gives_what_sessions_give(changes: dict, learn: bool) -> None:
    """Texts below, at and above mini-batches and windows; read, continued, read and continued again, all at once."""
    model = make(**changes)
    lengths = [1, M - 1, M, M + 1, K, 2 * M, 3 * M + 1, 5 * M + 3]
    engine = Engine(model, INNER, limits=Limits(max_batch=4, batch_invariant=False))
    ids = [engine.create(learn=learn).id for _ in lengths]
    tasks: list[list] = []
    for i, (sid, n) in enumerate(zip(ids, lengths, strict=True)):
        own = [
            engine.append(sid, text(n, i)),
            engine.generate(sid, Sampling(max_tokens=2 * M + i % 3, seed=i, top_p=0.9)),
        ]
        own += [engine.append(sid, text(M, 70 + i)), engine.generate(sid, Sampling(max_tokens=M, temperature=0))]
        tasks.append(own)
    for i, (sid, n) in enumerate(zip(ids, lengths, strict=True)):
        session = Session(model, INNER, learn=learn)
        nll = session.read(text(n, i))
        written = list(session.generate(2 * M + i % 3, seed=i, top_p=0.9))
        again = session.read(text(M, 70 + i))
        last = list(session.generate(M, temperature=0))
        found = [task.result() for task in tasks[i]]
        assert_close(found[0], nll)
        assert [token.id for token in tasks[i][1]] == written
        assert_close(found[2], again)
        assert [token.id for token in tasks[i][3]] == last
        info = engine.info(sid)
        assert info.position == session.position
        assert info.nbytes == session.nbytes
        assert info.drift == pytest.approx(session.drift(), rel=1e-10)
        assert (info.steps, info.rolled_back) == (session.steps, session.rolled_back)
    engine.close()


def assert_close(found: Appended, nll: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found.nll, dtype=nll.dtype), nll, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_logprobs_are_the_model_s() -> None:
    model = make()
    with Engine(model, INNER) as engine:
        sid = engine.create().id
        engine.append(sid, text(2 * M)).result()
        session = Session(model, INNER)
        session.read(text(2 * M))
        for token in engine.generate(sid, Sampling(max_tokens=M + 2, seed=1, temperature=0.3, top_k=4, logprobs=3)):
            assert isinstance(token, Token)
            log_p = model.logits(session.state.output)[0].log_softmax(-1)
            assert token.logprob == pytest.approx(log_p[token.id].item())
            assert [p for _, p in token.top] == pytest.approx(log_p.topk(3).values.tolist())
            assert token.position == session.position + 1
            session.read([token.id])


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"attention": "full"}], ids=str)
def test_lanes_on_a_gpu(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured, for several numbers of lanes, sessions at different positions; against float64 on the CPU."""
    monkeypatch.setattr("longread.inner_loop.places.SPARE", 16)
    sizes = {"width": 32, "mini_batch_size": 8, "window_size": 24}
    exact = make(**sizes, **changes)
    model = make(torch.float32, **sizes, **changes).cuda()
    model.load_state_dict(exact.state_dict())
    lengths = (1, 7, 8, 9, 30)
    texts = [text(80, i) for i in range(len(lengths))]
    places = Places(model, 2, learn=True)
    for i, n in enumerate(lengths):
        if i == places.lanes:
            places.resize(2 * places.lanes)
        begun = torch.tensor([texts[i][:n]], device="cuda")
        places.put(i, read(model, begin(model), begun, inner=INNER).state, learn=True)
    for step in range(40):
        tokens = [texts[i][n + step] for i, n in enumerate(lengths)]
        for i in range(len(lengths)):
            if places.due(i):
                places.step(i, torch.tensor([tokens[i]]), INNER)
        places.read(torch.tensor(tokens, device="cuda"))
    for i, n in enumerate(lengths):
        expected = read(exact, begin(exact), torch.tensor([texts[i][: n + 40]]), inner=INNER).state
        torch.testing.assert_close(
            places.logits(5)[i].cpu().double(), exact.logits(expected.output)[0], rtol=0, atol=2e-3
        )
        for x, y in zip(places.take(i).tensors, expected.tensors, strict=True):
            torch.testing.assert_close(x.cpu().double(), y.double(), rtol=0, atol=5e-3)


@pytest.mark.gpu
def test_an_engine_on_a_gpu(tmp_path: Path) -> None:
    """Sessions that move between the GPU, the host and the disk read as in float64 on the CPU."""
    sizes = {"width": 32, "mini_batch_size": 8, "window_size": 24}
    exact = make(**sizes)
    model = make(torch.float32, **sizes).cuda()
    model.load_state_dict(exact.state_dict())
    size = largest_session(model)
    limits = Limits(device_bytes=4 * size, host_bytes=3 * size, max_batch=2)
    with Engine(model, INNER, directory=tmp_path, limits=limits) as engine:
        ids = [engine.create().id for _ in range(12)]
        sessions = [Session(exact, INNER) for _ in ids]
        for turn in range(3):
            tasks = [engine.append(sid, text(50 + i, turn)) for i, sid in enumerate(ids)]
            for i, (task, session) in enumerate(zip(tasks, sessions, strict=True)):
                expected = session.read(text(50 + i, turn))
                found = torch.tensor(task.result().nll, dtype=torch.float64)
                torch.testing.assert_close(found, expected, rtol=0, atol=5e-3, equal_nan=True)
        tasks = [engine.generate(sid, Sampling(max_tokens=20, temperature=0)) for sid in ids]
        for task, session in zip(tasks, sessions, strict=True):
            for token in task:  # two near-equal logits may change places: follow the engine, and compare what it says
                log_p = exact.logits(session.state.output)[0].log_softmax(-1)
                assert token.logprob == pytest.approx(log_p[token.id].item(), abs=5e-3)
                session.read([token.id])
