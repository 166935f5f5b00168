"""A seed's whole life in models of each kind, by the public moves."""

from __future__ import annotations

import pytest
import torch
from hf_cases import CASES, Case
from kasmina_core import SeedStage
from kasmina_core.testing import LifeCases
from kasmina_core.testing.lives import bring_to, shake


class TestLives(LifeCases):
    cases = CASES


def test_a_grown_model_returns_what_the_bare_model_does(case: Case) -> None:
    assert type(case.grown()(**case.batch())) is type(case.host()(**case.batch()))


@pytest.mark.parametrize("recorded_before", [False, True])
def test_recorded_hidden_states_are_those_that_the_next_layer_gets(case: Case, recorded_before: bool) -> None:
    host = case.host()
    if recorded_before:
        host(**case.inputs(), output_hidden_states=True)
    model = case.open(host)
    first = next(iter(model.slots))
    bring_to(model, SeedStage.FOSSILIZED, first, case.blueprint)
    shake(model)
    passed: list[torch.Tensor] = []
    model.slots[first].register_forward_hook(lambda _m, _a, out: passed.append(out))
    states = model(**case.inputs(), output_hidden_states=True).hidden_states
    assert torch.equal(states[1], passed[0])


@pytest.mark.parametrize("blueprint", ["transformer:attention", "transformer:mlp"])
@pytest.mark.parametrize(
    ("name", "options"), [("llama", {"use_cache": False}), ("llama", {}), ("bert", {}), ("gpt2", {})]
)
def test_a_grown_model_compiles_to_one_graph(name: str, options: dict[str, bool], blueprint: str) -> None:
    case = CASES[name]
    fresh = case.open(case.build()).eval()
    fresh.load_state_dict(case.grown(SeedStage.FOSSILIZED, blueprint).state_dict())
    torch.compiler.reset()
    compiled = torch.compile(fresh, fullgraph=True, backend="eager")
    inputs = {**case.inputs(), **options}
    torch.testing.assert_close(compiled(**inputs).logits, fresh(**inputs).logits)
    mask = torch.ones_like(inputs["input_ids"])
    for hidden in (2, 4):  # read in the graph, not into it
        mask[:, :hidden] = 0
        together = compiled(**inputs, attention_mask=mask).logits
        torch.testing.assert_close(together, fresh(**inputs, attention_mask=mask).logits)
