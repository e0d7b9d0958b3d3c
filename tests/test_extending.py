"""Another inner optimizer: registered in one place, and taken wherever the library steps; docs/extending.md runs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longread.checkpoint import load_model, save_model
from longread.cli import main
from longread.config import InnerConfig, UserError
from longread.data import Batch
from longread.inner_loop import begin, captured, optimizer_named, read, reading, register_inner_optimizer
from longread.inner_loop.step import from_matrices, matrices
from longread.model import Transformer, initialize
from longread.outer_loop import end_to_end_loss
from longread.recipes import recipe
from longread.session import Session
from longread.tokenizer import ByteTokenizer
from longread.train.captured import CapturedGradient
from longread.train.gradient import accumulate_gradient
from tests.forked import Forked
from tests.tiny import M, config, make, text

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


def each_clipped(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], *, lr: float | Tensor, clip: float | None
) -> list[Tensor]:
    """W − lr · g, where each matrix's own norm is clipped smoothly, and W decays a little."""
    sizes = [(g.square().sum((-2, -1), keepdim=True) + 1e-12).sqrt() for g in gradients]
    limit = 1e30 if clip is None else clip
    return [(1 - 0.01 * lr) * w - lr * g / (1 + s / limit) for w, g, s in zip(weights, gradients, sizes, strict=True)]


def explodes(weights: Sequence[Tensor], gradients: Sequence[Tensor], **_: object) -> list[Tensor]:
    """Far too long a step for every second sequence, a short one for the others."""
    odd = torch.arange(weights[0].shape[0], device=weights[0].device).view(-1, 1, 1) % 2 == 0
    return [torch.where(odd, w + 1e6, w - 1e-3 * g) for w, g in zip(weights, gradients, strict=True)]


def of_another_shape(weights: Sequence[Tensor], gradients: Sequence[Tensor], **_: object) -> list[Tensor]:
    return [w[:1] for w in weights]


for _name, _rule in (("each_clipped", each_clipped), ("explodes", explodes), ("of_another_shape", of_another_shape)):
    register_inner_optimizer(_name, _rule)
RULE = InnerConfig(lr=0.3, clip=0.05, optimizer="each_clipped")


def batch(B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.tensor([text(T + 1, seed) for seed in range(B)])
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.2
    mask[:, M : 2 * M] = False  # a mini-batch without a target: its gradient is zero
    return tokens[:, :-1], tokens[:, 1:], mask


def unrolled(model: Transformer, ids: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The method by its definition, with the rule: loss of each mini-batch [B, T / M], and W after the last."""
    lower, pasts = model.empty_pasts(len(ids))
    hidden, _ = model.lower(ids, lower, start=0)
    fast, losses = matrices(model.initial_fast_weights(len(ids))), []
    for first in range(0, ids.shape[1], M):
        part = slice(first, first + M)
        output, own = model.upper(hidden[:, part], from_matrices(fast), pasts, start=first, order=2)
        logits = model.logits(output)
        nll = logits.logsumexp(-1) - logits.gather(2, targets[:, part, None])[..., 0]
        losses.append((nll * mask[:, part]).sum(1) / mask[:, part].sum(1).clamp(min=1))
        gradients = torch.autograd.grad(losses[-1].sum(), fast, create_graph=True)
        fast = each_clipped(fast, gradients, lr=RULE.lr, clip=RULE.clip)
        pasts = model.advance(pasts, own, model.num_lower_attentions)
    return torch.stack(losses, 1), torch.cat([w.flatten(1) for w in fast], 1)


@pytest.mark.parametrize("recompute", ["none", "blocks", "sqrt", "step", "all"])
def test_the_outer_gradient_goes_through_the_rule(recompute: Any) -> None:
    model, (ids, targets, mask) = make(3, torch.float64), batch(2, 5 * M)
    expected, _ = unrolled(model, ids, targets, mask)
    has = mask.unflatten(1, (-1, M)).any(-1)
    mean = ((expected * has).sum(1) / has.sum(1)).mean()
    gradients = torch.autograd.grad(mean, list(model.parameters()))
    found = end_to_end_loss(
        model,
        ids,
        targets,
        mask,
        inner_lr=RULE.lr,
        inner_clip=RULE.clip,
        inner_optimizer="each_clipped",
        recompute=recompute,
    )
    torch.testing.assert_close(found.mini_batch_loss * has, expected.detach() * has, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.loss, mean, rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad(found.loss, list(model.parameters()))
    for gradient, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-11)
    other = end_to_end_loss(model, ids, targets, mask, inner_lr=RULE.lr, inner_clip=RULE.clip)
    assert not torch.allclose(other.mini_batch_loss, found.mini_batch_loss)  # SGD is another rule


@pytest.mark.parametrize("splits", [[20], [1] * 20, [3, 1, 4, 1, 5, 6], [4, 4, 12], [5, 15], [7, 13]])
def test_reading_in_any_split_takes_the_same_steps(splits: list[int]) -> None:
    model = make(3, torch.float64)
    ids, targets, _ = batch(2, 5 * M)
    everything = torch.ones_like(ids, dtype=torch.bool)
    losses, fast = unrolled(model, ids, targets, everything)
    state, nll = begin(model, 2), []
    for part in ids.split(splits, dim=1):
        found = read(model, state, part, inner=RULE)
        state = found.state
        nll.append(found.nll)
    last = read(model, state, targets[:, -1:], inner=RULE)  # the step on the last mini-batch waits for its last target
    nll.append(last.nll)
    torch.testing.assert_close(torch.cat(nll, 1)[:, 1:].unflatten(1, (-1, M)).mean(-1), losses.detach())
    torch.testing.assert_close(torch.cat([w.flatten(1) for w in matrices(last.state.fast)], 1), fast.detach())


def test_the_guard_stands_around_every_rule() -> None:
    model = make(3, torch.float64)
    ids, _, _ = batch(4, 3 * M + 1)
    found = read(model, begin(model, 4), ids, inner=InnerConfig(optimizer="explodes"), guard=True)
    assert found.rolled_back.tolist() == [[True] * 3, [False] * 3] * 2
    moved = [
        (w - w0).abs().amax((1, 2))
        for w, w0 in zip(matrices(found.state.fast), matrices(begin(model, 4).fast), strict=True)
    ]
    assert all(bool(m[0] == 0 and m[2] == 0 and m[1] > 0 and m[3] > 0) for m in moved)
    session = Session(model, InnerConfig(optimizer="explodes"))
    session.read(ids[0])
    assert (session.steps, session.rolled_back) == (3, 3)


def test_a_rule_that_cannot_be_one_is_said_to_be_none() -> None:
    model = make(3)
    with pytest.raises(ValueError, match="gives other shapes or types than those of the weights"):
        read(model, begin(model, 2), batch(2, 2 * M)[0], inner=InnerConfig(optimizer="of_another_shape"))
    with pytest.raises(UserError, match="there is an inner optimizer 'sgd' already"):
        register_inner_optimizer("sgd", each_clipped)
    with pytest.raises(UserError, match="there is an inner optimizer 'explodes' already"):
        register_inner_optimizer("explodes", each_clipped)
    register_inner_optimizer("explodes", explodes)  # a module that is imported twice
    assert optimizer_named("explodes").rule is explodes


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["each_clipped", "explodes"])
def test_the_rule_is_taken_in_graphs_of_reading(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text on a GPU, captured, against float64 on a CPU; a refused step is refused in both."""
    inner = dataclasses.replace(RULE, optimizer=rule)
    model = make(3, torch.float64, mini_batch_size=8, window_size=16, width=32, mlp_hidden=32)
    ids = torch.tensor([text(325, seed) for seed in range(2)])
    expected = read(model, begin(model, 2), ids, inner=inner, guard=True)
    model, original = model.float().cuda(), captured.CapturedReader.read
    replays: list[torch.Size] = []
    monkeypatch.setattr(reading, "STRETCH", 48)  # so that the window is full long before the end
    monkeypatch.setattr(
        captured.CapturedReader, "read", lambda self, *a: replays.append(a[2].shape) or original(self, *a)
    )
    found = read(model, begin(model, 2), ids.cuda(), inner=inner, guard=True)
    assert replays
    torch.testing.assert_close(found.nll.cpu().double(), expected.nll, rtol=0, atol=2e-3, equal_nan=True)
    assert found.rolled_back.cpu().tolist() == expected.rolled_back.tolist()
    assert expected.rolled_back.any() == (rule == "explodes")
    for w, other in zip(matrices(found.state.fast), matrices(expected.state.fast), strict=True):
        torch.testing.assert_close(w.cpu().double(), other, rtol=0, atol=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "sqrt"])
def test_the_rule_is_taken_in_the_graph_of_training(recompute: Any) -> None:
    """Gradient of a batch, captured, against a plain one; the rate reaches the graph."""
    run = dataclasses.replace(
        recipe("toy"),
        model=config(width=32, mlp_hidden=32),
        inner=RULE,
        recompute=recompute,
        batch_size=2,
        context_length=5 * M,
    )
    ids, targets, mask = batch(2, 5 * M)
    plain_model, model = make(3, width=32, mlp_hidden=32), make(3, width=32, mlp_hidden=32).cuda()
    gradient = CapturedGradient(model, run)
    for rate in (0.3, 0.1, 0.2):
        plain_model.zero_grad()
        plain = accumulate_gradient(plain_model, run, Batch(ids, targets, mask), inner_lr=rate)
        found = gradient(Batch(ids, targets, mask).to(torch.device("cuda")), inner_lr=rate)
        assert found.loss.item() == pytest.approx(plain.loss.item(), rel=1e-4)
        for parameter, other in zip(model.parameters(), plain_model.parameters(), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.cpu(), other.grad, rtol=1e-2, atol=1e-5)


def test_what_nobody_registered_is_refused_with_the_remedy(tmp_path: Path) -> None:
    rule = r"optimizer is 'momentum'; it must be one of .*sgd.*longread\.register_inner_optimizer before"
    mixer = r"mixer is 'rwkv'; it must be one of attention, mamba2.*longread\.register_mixer before"
    with pytest.raises(UserError, match=rule):
        InnerConfig(optimizer="momentum")
    with pytest.raises(UserError, match=mixer):
        config(mixer="rwkv")
    model = make(1)
    for part, field, name, reason in (("inner", "optimizer", "momentum", rule), ("model", "mixer", "rwkv", mixer)):
        save_model(tmp_path / part, model, InnerConfig(), None)
        path = tmp_path / part / "config.json"
        values = json.loads(path.read_text())
        values[part][field] = name
        path.write_text(json.dumps(values))
        with pytest.raises(UserError, match=reason):
            load_model(tmp_path / part)
    session = Session(model.requires_grad_(False), RULE)
    session.read(text(10))
    session.save(tmp_path / "session")
    assert Session.restore(tmp_path / "session", model).inner == RULE
    whole = (tmp_path / "session").read_bytes()
    (tmp_path / "other").write_bytes(whole.replace(b"each_clipped", b"each_skipped"))
    with pytest.raises(UserError, match="optimizer is 'each_skipped'; it must be one of"):
        Session.restore(tmp_path / "other", model)


def test_configs_of_today_write_the_files_of_today(tmp_path: Path) -> None:
    assert "optimizer" not in InnerConfig().as_dict()
    assert InnerConfig.from_dict(InnerConfig().as_dict()) == InnerConfig()
    assert RULE.as_dict()["optimizer"] == "each_clipped"
    assert InnerConfig.from_dict(RULE.as_dict()) == RULE
    run = recipe("toy").as_dict()
    assert " ".join(run) == (
        "name model optimizer inner loss meta_gradient truncate_after context_length batch_size micro_batch_size steps "
        "seed recompute precision evaluate_every checkpoint_every max_bad_steps"
    )
    assert " ".join(run["model"]) == (
        "vocab_size width num_blocks num_heads mlp_hidden window_size mini_batch_size num_suffix_blocks attention "
        "mixer binding rope_base norm_eps tie_embeddings pre_norm post_norm qk_norm init_std"
    )
    assert run["inner"] == {"lr": 1.0, "clip": 1.0, "warmup_from": 0.1, "warmup_steps": 25}
    boxed = load_model(ROOT / "models" / "longread-small")
    save_model(tmp_path / "again", boxed.model, boxed.inner, boxed.metadata["tokenizer_fingerprint"])
    old, new = (
        json.loads((p / "config.json").read_text()) for p in (ROOT / "models" / "longread-small", tmp_path / "again")
    )
    assert all(old[part] == new[part] for part in ("fingerprint", "model", "inner"))


def run_script(directory: Path, name: str) -> None:
    """As Python runs one that lies in a directory."""
    os.chdir(directory)
    sys.path.insert(0, str(directory))
    runpy.run_path(name, run_name="__main__")


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All of docs/extending.md: its blocks in turn, then its script as the command line."""
    registering = [block for block in BLOCKS if "register" in block and not block.startswith("#")]
    assert len(registering) == 2
    using = [block for block in BLOCKS if block not in registering and not block.startswith("#")]
    (tmp_path / "my_extensions.py").write_text("\n".join(registering))
    (tmp_path / "all.py").write_text("from my_extensions import *\n" + "\n".join(using))
    (tmp_path / "my_longread.py").write_text(next(block for block in BLOCKS if block.startswith("# my_longread.py")))
    initial = Transformer(dataclasses.replace(config(), vocab_size=257))
    initialize(initial, seed=1)
    save_model(tmp_path / "model", initial, InnerConfig(), ByteTokenizer.fingerprint)
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    values["inner"]["optimizer"] = "normalised"
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    ByteTokenizer().save(tmp_path / "model")
    (tmp_path / "book.txt").write_text("A book of a few words, and of a few more. " * 4)
    read_it = ["read", "book.txt", "--model", "model", "--device", "cpu"]
    small = ["model.width=16", "model.num_blocks=2", "model.mlp_hidden=16", "model.window_size=16", "steps=2"]
    small += ["model.mini_batch_size=8", "optimizer.warmup_steps=0", "optimizer.decay_steps=2", "batch_size=2"]
    train = ["train", "toy", "--data", "data", "--out", "run", "--context-length", "32", "--device", "cpu"]
    train += [argument for setting in (*small, "inner.optimizer=normalised") for argument in ("--set", setting)]
    prepare = ["prepare", "book.txt", "--out", "data", "--tokenizer", "bytes"]
    (tmp_path / "everything.py").write_text(
        "import runpy, sys\nrunpy.run_path('all.py')\n"
        f"for sys.argv in (['', *arguments] for arguments in {[read_it, prepare, train]!r}):\n"
        "    try:\n        runpy.run_path('my_longread.py')\n"
        "    except SystemExit as end:\n        assert end.code == 0, sys.argv\n"
    )
    ran = Forked(run_script, tmp_path, "everything.py")
    said, errors = ran.communicate(300)
    assert ran.returncode == 0, errors
    assert re.search(r"8 steps, \d\.\d\d nats per token", said)
    assert "learning" in said
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["inner"]["optimizer"] == "normalised"
    with monkeypatch.context() as here:  # this process has not imported my_extensions
        here.chdir(tmp_path)
        assert main(read_it) == 2
    assert "register_inner_optimizer" in capsys.readouterr().err
