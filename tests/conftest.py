"""What every test shares: no network, no screen, a fixed seed, the default dtype put back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="Agg", WANDB_MODE="disabled")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("this test needs a CUDA device; leave it out with -m 'not gpu'", pytrace=False)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
