"""What every test on a CUDA device starts from: known random numbers, deterministic convolutions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        torch.manual_seed(0)
        deterministic = torch.backends.cudnn.deterministic
        torch.backends.cudnn.deterministic = True
        yield
        torch.backends.cudnn.deterministic = deterministic
