from __future__ import annotations

import pytest
from hf_cases import CASES, Case


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=["gpt2", "llama"])
def speaker(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]
