"""Networks with recurrent mixers: read in any pieces and in constant memory, kept, trained, refused where they must."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longread.checkpoint import export_official, load_model, save_model
from longread.config import BindingConfig, InnerConfig, ModelConfig, OptimizerConfig, RunConfig, UserError
from longread.data import TokenDataset, prepare
from longread.inner_loop import ReadingState, begin, next_token_logits, read, reading
from longread.model import Transformer, fingerprint_of, initialize
from longread.outer_loop import static_loss
from longread.recipes import RECIPES, SIZES, recipe, toy, with_mixer
from longread.session import Session
from longread.tokenizer import ByteTokenizer
from longread.train import train
from longread.train.optimizer import make_optimizer, update
from tests import tiny

M = 4
INNER = InnerConfig(lr=0.7, clip=0.5)
MIXERS: list[dict] = [
    {"mixer": "mamba2"},
    {"mixer": "gated_deltanet"},
    {"mixer": "ttt_kvb"},
    {"mixer": "ttt_kvb", "binding": BindingConfig(lr=0.02, clip=None, output="key")},
]


def id_of(changes: dict) -> str:
    return changes["mixer"] + "-simplified" * ("binding" in changes)


each_mixer = pytest.mark.parametrize("changes", MIXERS, ids=id_of)
each_plain_mixer = pytest.mark.parametrize(
    "changes", [pytest.param(c, marks=pytest.mark.slow if "binding" in c else ()) for c in MIXERS], ids=id_of
)


def config(**changes: object) -> ModelConfig:
    """Nothing learns but what the mixer brings."""
    return tiny.config(**{"num_suffix_blocks": 0} | changes)


def make(**changes: object) -> Transformer:
    model = Transformer(config(**changes)).double()
    initialize(model, seed=3)
    return model


def tokens(n: int, B: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(19, (B, n), generator=torch.Generator().manual_seed(seed))


def read_in(model: Transformer, text: Tensor, sizes: list[int]) -> tuple[ReadingState, Tensor]:
    state, nll, done = begin(model, text.shape[0]), [], 0
    for size in sizes:
        result = read(model, state, text[:, done : done + size], inner=INNER)
        state, done = result.state, done + size
        nll.append(result.nll)
    assert done == text.shape[1]
    return state, torch.cat(nll, 1)


def equal_states(a: ReadingState, b: ReadingState) -> None:
    assert a.position == b.position
    for x, y in zip(a.tensors, b.tensors, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@each_mixer
@pytest.mark.parametrize(
    ("stretch", "length"),
    [
        *((2048, length) for length in (1, M - 1, M, M + 1, 2 * M, 5 * M + 3)),
        *((7, length) for length in (2 * M, 5 * M + 3)),  # shorter texts are one stretch anyway
        *(pytest.param(M, length, marks=pytest.mark.slow) for length in (M + 1, 2 * M, 5 * M + 3)),
    ],
)
def test_every_split_is_the_same_reading(
    changes: dict, length: int, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "STRETCH", stretch)
    model, text = make(**changes), tokens(length)
    whole = read_in(model, text, [length])
    for split in ([1] * length, [length - 1, 1], [0, 1, length - 1], [length // 2, length - length // 2]):
        state, nll = read_in(model, text, split)
        torch.testing.assert_close(nll, whole[1], rtol=1e-9, atol=1e-11, equal_nan=True)
        equal_states(state, whole[0])


@each_mixer
def test_reading_scores_what_training_scores(changes: dict) -> None:
    model, text = make(**changes), tokens(5 * M + 1)
    _, nll = read_in(model, text, [5 * M + 1])
    trained = static_loss(model, text[:, :-1], text[:, 1:], torch.ones_like(text[:, 1:], dtype=torch.bool))
    torch.testing.assert_close(nll[:, 1:], trained.nll, rtol=1e-9, atol=1e-11)


@each_mixer
def test_nothing_later_is_seen_and_everything_earlier_is(changes: dict) -> None:
    """Far beyond the windows of all blocks the first token still matters; no prediction sees its own target."""
    model = make(**changes, window_size=2)
    text = tokens(9 * M, B=1)
    other = text.clone()
    other[:, 0] = (other[:, 0] + 1) % 19
    _, nll = read_in(model, text, [9 * M])
    _, changed = read_in(model, other, [9 * M])
    assert (nll[:, -1] - changed[:, -1]).abs().item() > 1e-9
    later = text.clone()
    later[:, 20] = (later[:, 20] + 1) % 19
    _, changed = read_in(model, later, [9 * M])
    assert torch.equal(nll[:, 1:20], changed[:, 1:20])
    assert not torch.allclose(nll[:, 20:], changed[:, 20:])


@each_plain_mixer
def test_the_state_has_one_size_at_any_length(changes: dict) -> None:
    model = make(**changes).float()
    state, sizes = begin(model), set()
    for n in (64 * M, 128 * M, 512 * M):
        state = read(model, state, tokens(n - state.position, B=1), inner=INNER).state
        sizes.add(state.nbytes)
        assert all(x.grad_fn is None and not x.requires_grad for x in state.tensors)
    assert len(sizes) == 1


@each_mixer
def test_a_state_is_a_value(changes: dict) -> None:
    model = make(**changes)
    start = read(model, begin(model, 2), tokens(M + 2), inner=INNER).state
    copy = [x.clone() for x in start.tensors]
    one = read(model, start, tokens(9, seed=1), inner=INNER)
    read(model, start, tokens(9, seed=2), inner=INNER)
    assert all(torch.equal(x, y) for x, y in zip(start.tensors, copy, strict=True))
    assert torch.equal(one.nll, read(model, start, tokens(9, seed=1), inner=INNER).nll)


@each_mixer
@pytest.mark.parametrize("n", [0, 1, M, 5 * M + 3])
def test_a_restored_session_and_a_fork_go_on_bit_for_bit(changes: dict, n: int, tmp_path: Path) -> None:
    session = Session(make(**changes).float(), INNER)
    session.read(tokens(n, B=1)[0])
    session.save(tmp_path / "s.safetensors")
    restored = Session.restore(tmp_path / "s.safetensors", make(**changes).float())
    fork = session.fork()
    fork.read(tokens(3, B=1, seed=5)[0])
    assert restored.position == session.position == n
    more = tokens(11, B=1, seed=1)[0]
    assert torch.equal(restored.read(more).nan_to_num(), session.read(more).nan_to_num())


@each_mixer
def test_writing_is_reading_what_one_writes(changes: dict) -> None:
    session, reader = (Session(make(**changes), INNER) for _ in range(2))
    session.read(tokens(M + 1, B=1)[0])
    written = list(session.generate(2 * M + 1, seed=5))
    reader.read([*tokens(M + 1, B=1)[0].tolist(), *written])
    equal_states(session.state, reader.state)
    torch.testing.assert_close(
        next_token_logits(session.model, session.state), next_token_logits(reader.model, reader.state)
    )


@each_mixer
def test_a_session_goes_on_in_half_precision(changes: dict, tmp_path: Path) -> None:
    session = Session(make(**changes).float(), INNER)
    session.read(tokens(14, B=1)[0])
    session.save(tmp_path / "s")
    half = make(**changes).float()
    half.compute_dtype = torch.bfloat16
    restored = Session.restore(tmp_path / "s", half)
    more = tokens(20, B=1, seed=1)[0]
    assert torch.allclose(restored.read(more), session.read(more), atol=0.15, equal_nan=True)
    memories = [x for past in restored.state.lower_pasts for x in past if x.dtype == torch.float32]
    assert memories  # what is written to many times stays wide


@each_mixer
def test_parameters_are_counted_and_all_are_trained(changes: dict) -> None:
    for switches in ({}, {"qk_norm": False}, {"pre_norm": False}, {"post_norm": False}, {"tie_embeddings": False}):
        model = Transformer(config(**changes | switches))
        assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters
    text = tokens(6 * M + 1)
    static_loss(model, text[:, :-1], text[:, 1:], torch.ones_like(text[:, 1:], dtype=torch.bool)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@each_mixer
def test_the_gradient_is_a_finite_difference(changes: dict) -> None:
    """Through the recurrence, and through the inner steps of key-value binding."""
    model, text = make(**changes), tokens(4 * M + 1)
    arguments = text[:, :-1], text[:, 1:], torch.ones_like(text[:, 1:], dtype=torch.bool)
    static_loss(model, *arguments).loss.backward()
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    slope = sum((p.grad * direction[name]).sum() for name, p in model.named_parameters() if p.grad is not None)
    values, eps = [], 1e-6
    with torch.no_grad():
        for sign in (1, -2):
            for name, p in model.named_parameters():
                p += sign * eps * direction[name]
            values.append(static_loss(model, *arguments).loss.item())
    assert (values[0] - values[1]) / (2 * eps) == pytest.approx(float(slope), rel=1e-5)


@each_plain_mixer
def test_training_lowers_the_loss(changes: dict) -> None:
    """A text that repeats itself at a distance beyond the window."""
    model = Transformer(config(**changes, width=32, mlp_hidden=48, mini_batch_size=11))
    initialize(model, seed=0)
    text = tokens(12, B=8).repeat(1, 4)[:, : 4 * 11 + 1]
    rates = OptimizerConfig(lr=2e-2, warmup_steps=3, decay_steps=30)
    optimizer, losses = make_optimizer(model, rates), []
    for step in range(30):
        outer = static_loss(model, text[:, :-1], text[:, 1:], torch.ones_like(text[:, 1:], dtype=torch.bool))
        outer.loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        update(model, optimizer, rates, step, norm)
        losses.append(outer.loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_how_mixers_are_combined() -> None:
    assert [config(mixer="mamba2").mixers_of(i) for i in range(4)] == [("mamba2",), ("attention",)] * 2
    assert [config(mixer="gated_deltanet").mixers_of(i) for i in range(3)][::2] == [("gated_deltanet",)] * 2
    assert {config(mixer="ttt_kvb").mixers_of(i) for i in range(4)} == {("attention", "ttt_kvb")}
    assert {config().mixers_of(i) for i in range(4)} == {("attention",)}
    names = {name for name, _ in Transformer(config(mixer="mamba2")).named_parameters()}
    assert "blocks.0.mamba2.forgetting.log_rate" in names
    assert "blocks.1.attention.query.weight" in names


def test_simplified_binding_has_no_queries() -> None:
    simplified = Transformer(config(mixer="ttt_kvb", binding=BindingConfig(output="key")))
    assert not any("ttt_kvb.query" in name for name, _ in simplified.named_parameters())
    assert simplified.config.num_parameters < config(mixer="ttt_kvb").num_parameters


def test_binding_uses_its_rate_and_its_clip() -> None:
    text = tokens(6 * M)
    options = [BindingConfig(), BindingConfig(lr=0.0), BindingConfig(clip=0.1), BindingConfig(lr=0.02, clip=None)]
    scores = [read_in(make(mixer="ttt_kvb", binding=binding), text, [6 * M])[1][:, 1:] for binding in options]
    # the first mini-batch is answered by W_0 whatever is bound later
    assert all(torch.equal(scores[0][:, :M], other[:, :M]) for other in scores)
    assert len({other[:, M:].sum().item() for other in scores}) == 4


def test_decay_spares_what_it_would_pull_to_no_meaningful_value() -> None:
    model = Transformer(config(mixer="mamba2"))
    decayed, exempt = make_optimizer(model, OptimizerConfig(lr=1.0)).param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    of = {id(p): name for name, p in model.named_parameters()}
    spared = {of[id(p)].rpartition(".")[2] for p in exempt["params"]}
    assert spared == {"log_rate", "step_bias", "skip"}
    assert len(decayed["params"]) + len(exempt["params"]) == len(of)


@each_mixer
def test_initial_weights_repeat_and_heads_forget_at_different_rates(changes: dict) -> None:
    one, two = make(**changes), make(**changes)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    for name, parameter in one.named_parameters():
        if name.endswith("log_rate"):
            assert ((parameter >= 0) & (parameter <= torch.tensor(16.0).log())).all()
        if name.endswith("step_bias"):
            step = torch.nn.functional.softplus(parameter)
            assert ((step > 0.0009) & (step < 0.11)).all()


@pytest.mark.parametrize("name", RECIPES)
def test_all_methods_of_a_recipe_have_equal_parameters(name: str) -> None:
    counts = [recipe(name, method).model.num_parameters for method in ("e2e", "swa", "hybrid", "mamba2", "gdn", "kvb")]
    assert max(counts) / min(counts) < 1.02


def test_methods_are_what_they_are_called() -> None:
    for method, mixer in (("mamba2", "mamba2"), ("gdn", "gated_deltanet"), ("kvb", "ttt_kvb")):
        run = toy(method)  # type: ignore[arg-type]
        assert (run.model.mixer, run.loss, run.model.num_suffix_blocks) == (mixer, "static", 0)
        assert run.model.window_size == toy("swa").model.window_size
    for size in SIZES:
        gdn = recipe(size, "gdn").model
        assert 3 * gdn.width // 4 // gdn.num_delta_heads <= 256  # a limit of the kernel


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mixer": "ttt_kvb", "num_suffix_blocks": 1}, "no fast MLPs; set model.num_suffix_blocks to 0 instead of 1"),
        ({"mixer": "mamba2", "attention": "hybrid"}, "goes with model.attention window, not with hybrid"),
        ({"mixer": "gated_deltanet", "width": 18, "num_heads": 1}, "width 18 is not a multiple of 4"),
        ({"mixer": "mamba"}, "one of attention, mamba2, gated_deltanet, ttt_kvb"),
    ],
)
def test_combinations_that_cannot_be(changes: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        config(**changes)


def test_mlps_cannot_be_narrowed_below_nothing() -> None:
    with pytest.raises(UserError, match=r"but model\.mlp_hidden is 24; make it larger"):
        with_mixer(config(), "ttt_kvb", multiple=8)
    for wrong in ({"lr": -1.0}, {"clip": 0.0}):
        with pytest.raises(UserError, match="it must be"):
            BindingConfig(**wrong)


def test_configs_from_before_there_were_mixers_still_load() -> None:
    values = dataclasses.asdict(config())
    del values["mixer"], values["binding"]
    assert ModelConfig.from_dict(values) == config()
    assert ModelConfig.from_dict(dataclasses.asdict(config(**MIXERS[3]))) == config(**MIXERS[3])


def test_the_fingerprint_of_an_attention_model_is_what_it_was() -> None:
    """Else every session kept until now would belong to no model."""
    from longread.files import digest

    model = make()
    written = {
        "vocab_size": 19,
        "width": 16,
        "num_blocks": 4,
        "num_heads": 2,
        "mlp_hidden": 24,
        "window_size": 6,
        "mini_batch_size": M,
        "num_suffix_blocks": 0,
        "attention": "window",
        "rope_base": 500_000.0,
        "norm_eps": 1e-6,
        "tie_embeddings": True,
        "pre_norm": True,
        "post_norm": True,
        "qk_norm": True,
        "init_std": None,
    }
    assert fingerprint_of(model) == digest(written, model.state_dict())
    one, two = (make(mixer="ttt_kvb", binding=BindingConfig(lr=lr)) for lr in (1.0, 0.5))
    assert fingerprint_of(one) != fingerprint_of(two)


@each_mixer
def test_models_are_kept_and_other_kinds_refused(changes: dict, tmp_path: Path) -> None:
    model = make(**changes).float()
    save_model(tmp_path / "model", model, INNER, None)
    loaded = load_model(tmp_path / "model").model
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    with pytest.raises(UserError, match=f"mixer {changes['mixer']} has no name in the official layout"):
        export_official(tmp_path / "official", model, INNER)
    assert not (tmp_path / "official").exists()
    session = Session(model, INNER)
    session.save(tmp_path / "s")
    with pytest.raises(UserError, match="belongs to another model"):
        Session.restore(tmp_path / "s", make().float())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    directory = tmp_path_factory.mktemp("data")
    (directory / "text.txt").write_text(" ".join(f"word{i * i % 97}" for i in range(300)))
    return prepare([directory / "text.txt"], directory / "data", ByteTokenizer(), documents="join")


def run_of(steps: int, **changes: object) -> RunConfig:
    return RunConfig(
        name="microscopic",
        model=config(vocab_size=257, **changes),
        loss="static",
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1, decay_steps=4),
        context_length=8 * M,
        batch_size=2,
        steps=steps,
        checkpoint_every=2,
    )


@each_plain_mixer
def test_a_run_that_was_interrupted_ends_the_same(changes: dict, data: TokenDataset, tmp_path: Path) -> None:
    whole = train(run_of(4, **changes), data, tmp_path / "whole", validation=data)
    train(run_of(2, **changes), data, tmp_path / "parts", validation=data)
    resumed = train(run_of(4, **changes), data, tmp_path / "parts", validation=data, resume=True)
    assert (whole.step, resumed.step) == (4, 4)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_model_with_another_mixer_is_no_beginning(data: TokenDataset, tmp_path: Path) -> None:
    train(run_of(1, mixer="mamba2"), data, tmp_path / "first")
    with pytest.raises(
        UserError, match=r"first has model\.mixer mamba2 and this run has gated_deltanet; begin with a model"
    ):
        train(run_of(1, mixer="gated_deltanet"), data, tmp_path / "second", initial=tmp_path / "first")
    assert not (tmp_path / "second").exists()


def wide(changes: dict) -> Transformer:
    return make(**changes, width=64, num_heads=2, mlp_hidden=64, window_size=32, mini_batch_size=32)


def gradients_of(model: Transformer, text: Tensor) -> Tensor:
    """Of the static loss, all in one vector."""
    text = text.to(model.device)
    static_loss(model, text[:, :-1], text[:, 1:], torch.ones_like(text[:, 1:], dtype=torch.bool)).loss.backward()
    return torch.cat([p.grad.flatten().cpu().double() for p in model.parameters()])


@pytest.mark.gpu
@each_mixer
def test_a_gpu_reads_what_a_cpu_reads(changes: dict) -> None:
    """bf16 with kernels, in pieces, against float64 without."""
    text = tokens(1000)
    expected = read_in(wide(changes), text, [1000])[1]
    model = wide(changes).float().cuda()
    model.compute_dtype = torch.bfloat16
    for sizes in ([1000], [333, 1, 1, 600, 65]):
        nll = read_in(model, text.cuda(), sizes)[1].cpu().double()
        assert (nll[:, 1:] - expected[:, 1:]).abs().mean().item() < 0.02


@pytest.mark.gpu
@each_mixer
def test_gradients_on_a_gpu_are_those_of_a_cpu(changes: dict) -> None:
    """float32 against float64: these weights multiply a rounding error by a thousand, and bf16 has none to spare."""
    text = tokens(31 * 32 + 1)
    expected = gradients_of(wide(changes), text)
    found = gradients_of(wide(changes).float().cuda(), text)
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3
