"""Training readers in Transformers: loss and gradient of the model as it learns, from labels and padded rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from longread.checkpoint import load_model
from longread.config import InnerConfig, UserError
from longread.outer_loop import end_to_end_loss, static_loss
from longread.transformers import InnerRateWarmup, LongreadConfig, LongreadForCausalLM, SessionCache
from longread.transformers.versions import CACHE
from tests.test_outer_loop import same
from tests.tiny import INNER, M, config, text


def make(dtype: torch.dtype = torch.float64, **changes: object) -> LongreadForCausalLM:
    """In training, away from the point where it was drawn, so that steps are large."""
    torch.manual_seed(4)
    settings = LongreadConfig(model=config(**changes).as_dict(), inner=INNER.as_dict())
    model = LongreadForCausalLM(settings).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


def gradients(model: LongreadForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def tokens(n: int, B: int = 2) -> Tensor:
    return torch.tensor([text(n, seed) for seed in range(B)])


def native(model: LongreadForCausalLM, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """`end_to_end_loss` of whole mini-batches, the tokens behind each and a mask."""
    settings = {"inner_lr": INNER.lr, "inner_clip": INNER.clip} | options
    return end_to_end_loss(model.network, ids[:, :-1], ids[:, 1:], mask, **settings).loss


def test_the_gradient_is_the_meta_gradient() -> None:
    """Of whole mini-batches, and of texts that end inside one; a model in training returns no cache."""
    model, ids = make(), tokens(4 * M + 1)
    mask = torch.ones(2, 4 * M, dtype=torch.bool)
    found = model(ids, labels=ids)
    expected = native(model, ids, mask)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    same(gradients(model, found.loss), gradients(model, expected), 1e-10)
    assert CACHE not in found
    cut = ids[:, : 3 * M + 2]
    mask[:, 3 * M + 1 :] = False
    found, expected = model(cut, labels=cut), native(model, ids, mask)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    same(gradients(model, found.loss), gradients(model, expected), 1e-10)


def test_padding_is_no_text_wherever_it_is() -> None:
    """Rows with padding on the left, on the right and in between are the rows; their loss is the mean of theirs."""
    model, lengths = make(), (3 * M + 1, 2 * M, M + 2)
    rows = [tokens(n, 3)[i : i + 1] for i, n in enumerate(lengths)]
    ids, mask = torch.full((3, 3 * M + 1), 18), torch.zeros(3, 3 * M + 1, dtype=torch.long)
    for i, (row, first) in enumerate(zip(rows, (0, M + 1, 2), strict=True)):
        places = torch.arange(row.shape[1]) + first
        if i == 2:
            places[3:] += 4
        ids[i, places], mask[i, places] = row[0], 1
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.0, -100)
    found = model(ids, attention_mask=mask, labels=labels)
    alone = [model(row, labels=row) for row in rows]
    torch.testing.assert_close(found.loss, torch.stack([x.loss for x in alone]).mean(), rtol=1e-10, atol=0)
    for logits, counts, one in zip(found.logits, mask.bool(), alone, strict=True):
        torch.testing.assert_close(logits[counts], one.logits[0], rtol=1e-9, atol=1e-9)
    expected = gradients(model, torch.stack([model(row, labels=row).loss for row in rows]).mean())
    same(gradients(model, model(ids, attention_mask=mask, labels=labels).loss), expected, 1e-9)


def test_tokens_without_a_label_are_read_and_learned_from() -> None:
    """As in reading: only what the loss is about changes."""
    model, ids = make(), tokens(4 * M + 1)
    labels = ids.clone()
    labels[0, : 2 * M] = -100
    labels[1, 3:7] = -100
    counts = labels[:, 1:] != -100
    everything = torch.ones_like(counts)
    found, expected = model(ids, labels=labels), native(model, ids, counts, inner_mask=everything)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    same(gradients(model, found.loss), gradients(model, expected), 1e-10)
    assert abs(found.loss - native(model, ids, counts)) > 1e-3
    reading = model.eval()(ids, labels=labels)
    torch.testing.assert_close(reading.logits, found.logits, rtol=1e-9, atol=1e-9)
    nll = torch.nn.functional.cross_entropy(reading.logits[:, :-1][counts], ids[:, 1:][counts])
    torch.testing.assert_close(reading.loss, nll, rtol=1e-9, atol=1e-9)


def test_logits_in_training_are_those_of_reading() -> None:
    """Constants beside a loss, differentiable without labels: then a loss of one's own has the meta-gradient too."""
    model, ids = make(), tokens(4 * M + 1)
    found = model(ids, labels=ids)
    assert not found.logits.requires_grad
    expected = gradients(model, found.loss)
    logits = model(ids).logits
    assert logits.shape == (2, 4 * M + 1, 19)
    own = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    same(gradients(model, own), expected, 1e-9)
    reading = model.eval()(ids).logits
    torch.testing.assert_close(found.logits, reading, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, reading, rtol=1e-9, atol=1e-9)
    model.train().config.training_logits = False
    assert model(ids, labels=ids).logits is None
    last = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, reading[:, -2:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"num_suffix_blocks": 0}], ids=str)
def test_who_does_not_learn_has_the_static_loss(changes: dict) -> None:
    model, ids = make(**changes), tokens(2 * M + 1)
    found = model(ids, labels=ids, **({"learn": False} if not changes else {}))
    mask = torch.ones(2, 2 * M, dtype=torch.bool)
    expected = static_loss(model.network, ids[:, :-1], ids[:, 1:], mask).loss
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    same(gradients(model, found.loss), gradients(model, expected), 1e-10)
    if not changes:
        model.config.learn = False
        torch.testing.assert_close(model(ids, labels=ids).loss, expected, rtol=1e-12, atol=0)


def test_products_run_in_the_type_of_autocast() -> None:
    """Over float32 parameters, in training and in reading; a cache keeps the type that it began with."""
    model, ids = make(torch.float32), tokens(2 * M + 1)
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids, labels=ids)
        assert model.network.dtype == torch.bfloat16
    found.loss.backward()  # after autocast has ended, as Trainer does it
    assert model.embedding.weight.grad is not None
    assert 0 < abs(found.loss.item() - exact.item()) < 0.1
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model(ids)[CACHE]
    assert cache.sessions[0].state.output.dtype == torch.bfloat16
    model(ids[:, :1], **{CACHE: cache})
    assert cache.sessions[0].state.output.dtype == torch.bfloat16
    model(ids)
    assert model.network.dtype == torch.float32


def test_wrong_input_of_training_is_one_sentence() -> None:
    model = make()
    with pytest.raises(UserError, match="the longest text has 1 tokens, none of which another predicts"):
        model(tokens(1), labels=tokens(1))
    with pytest.raises(UserError, match=r"labels have shape \[2, 4\] and input_ids \[2, 5\]"):
        model(tokens(5), labels=tokens(4))
    replica = make()
    replica._is_replica = True
    with pytest.raises(UserError, match="DataParallel cannot copy a reader"):
        replica(tokens(5), labels=tokens(5))


class Texts(torch.utils.data.Dataset):
    """Texts of different lengths."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.texts = [text(n, seed) for seed, n in enumerate(lengths)]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {"input_ids": self.texts[i]}


def collated(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer(model: LongreadForCausalLM, place: Path, steps: int, **options: Any) -> Trainer:
    data = Texts((4 * M + 1, 3 * M + 1))
    settings: dict[str, Any] = {
        "output_dir": str(place),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**(settings | options))
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collated)


def test_trainer(tmp_path: Path) -> None:
    """Its steps are steps on the meta-gradient; a checkpoint is a model of Longread, from which it goes on."""
    model, twin = make(), make()
    model.config.training_logits = False
    run = trainer(model, tmp_path, 4, optim="sgd", learning_rate=0.1)
    run.train()
    batch = collated([Texts((4 * M + 1, 3 * M + 1))[i] for i in range(2)])
    losses = []
    for _ in range(4):
        mask = batch["labels"][:, 1:] != -100
        loss = native(twin, batch["input_ids"], mask)
        twin.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter -= 0.1 * parameter.grad
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-3)
    assert losses[-1] < losses[0] - 0.05
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda reason, name=name: f"{name}: {reason}")
    loaded = load_model(tmp_path / "checkpoint-4")
    assert all(torch.equal(p, model.state_dict()[n]) for n, p in loaded.model.state_dict().items())
    assert loaded.inner == INNER
    again = make()
    again.config.training_logits = False
    resumed = trainer(again, tmp_path, 4, optim="sgd", learning_rate=0.1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert resumed.evaluate()["eval_loss"] < 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").config.learn


def test_the_inner_rate_warms_up_over_the_steps_of_a_trainer(tmp_path: Path) -> None:
    model, rates = make(torch.float32), []
    model.config.inner = InnerConfig(lr=1.0, warmup_from=0.2, warmup_steps=2).as_dict()
    forward = model.forward

    def noting(**given: Any) -> Any:
        rates.append(model.inner_rate)
        return forward(**given)

    model.forward = noting  # type: ignore[method-assign]
    run = trainer(model, tmp_path, 3, save_strategy="no")
    run.add_callback(InnerRateWarmup())
    run._signature_columns = ["input_ids"]
    run.train()
    assert rates == pytest.approx([0.6, 1.0, 1.0])
    assert model.inner_rate is None


def test_weights_that_change_have_no_fingerprint_of_a_file(tmp_path: Path) -> None:
    """A session that they have read is theirs, and not that of the weights before."""
    make(torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert SessionCache(model).fingerprint == load_model(tmp_path).fingerprint
    model.train()(tokens(5), labels=tokens(5))
    assert SessionCache(model).fingerprint is None
    model.save_pretrained(tmp_path)
    assert SessionCache(model).fingerprint == load_model(tmp_path).fingerprint
    model.load_state_dict(make(torch.float32).state_dict())
    assert SessionCache(model).fingerprint is None
