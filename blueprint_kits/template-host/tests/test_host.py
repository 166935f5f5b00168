"""The host can hold slots, and trains with and without seeds in them."""

from __future__ import annotations

import pytest
import torch
from kasmina_template_host import TemplateHost

from kasmina_core import MorphogeneticModel
from kasmina_core.testing import check_host, check_pack


@pytest.mark.parametrize("options", [{}, {"in_channels": 3, "num_classes": 2, "channels": 5, "n_blocks": 1}])
def test_host_can_hold_slots(options: dict[str, int]) -> None:
    check_host(TemplateHost, options=options).raise_if_failed()


def test_installed_pack() -> None:
    report = check_pack("template-host")
    report.raise_if_failed()
    assert list(report.hosts) == ["template-host:net"]


def test_host_learns_with_a_seed_in_it() -> None:
    torch.manual_seed(0)
    model = MorphogeneticModel(TemplateHost(num_classes=2))
    model.germinate("block1", "cnn:norm")
    model.step_epoch()
    x = torch.randn(16, 1, 8, 8)
    y = x.mean(dim=(1, 2, 3)).gt(0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
