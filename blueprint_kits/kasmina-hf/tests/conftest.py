from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hf_cases import CASES, Case


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=["gpt2", "llama"])
def speaker(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]
