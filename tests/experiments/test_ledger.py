"""What a run costs: operations counted once for each kind of work, charged at every call."""

from __future__ import annotations

import torch
from kasmina_cnn import CNNHost

from kasmina_core import GrowthConfig, MorphogeneticModel
from kasmina_core.experiments.arm import forward_kind
from kasmina_core.experiments.flops import FlopLedger, flop_counter


def test_flops_of_attention_on_the_cpu_are_counted() -> None:
    b, h, t, d = 2, 3, 16, 8
    q, k, v = (torch.randn(b, h, t, d, requires_grad=True) for _ in range(3))
    with flop_counter() as counter:
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == 2 * (2 * b * h * t * t * d)
    with flop_counter() as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 5 * (2 * b * h * t * t * d)


def test_a_ledger_charges_every_call_and_counts_each_kind_once() -> None:
    ledger, a = FlopLedger(), torch.randn(4, 5)
    for _ in range(3):
        ledger.charge("product", lambda: a @ a.T)
    assert ledger.total == 3 * 2 * 4 * 4 * 5
    assert ledger.charge("other", lambda: a.sum()) == a.sum()
    assert ledger.total == 3 * 2 * 4 * 4 * 5


def test_seeds_of_one_blueprint_with_other_options_are_counted_apart() -> None:
    model = MorphogeneticModel(CNNHost(n_blocks=2, base_channels=2), config=GrowthConfig(embargo_epochs=0))
    kinds = []
    for copies in (1, 2, 1):
        model.germinate("block2", "cnn:block", copies=copies)
        kinds.append(forward_kind(model))
        model.cull("block2", "for another")
        while model.slots["block2"].state is not None:
            model.step_epoch(1.0)
    assert kinds[0] == kinds[2] != kinds[1]
