"""A task of one's own: two noisy rings of points."""

import torch
from torch import nn

from kasmina_core import Task


def rings(seed: int = 0) -> Task:
    """Return points (n, 2), of which the inner ring is class 0 and the outer one class 1."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(2000) % 2
    angle = 2 * torch.pi * torch.rand(2000, generator=generator)
    radius = 1 + y + 0.3 * torch.randn(2000, generator=generator)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    parts = zip(x.chunk(4), y.chunk(4), strict=True)
    splits = dict(zip(("train", "gate", "val", "test"), parts, strict=True))
    return Task("rings", "classification", splits, n_classes=2, host=net, slots=("1",), epochs=40, lr=1e-2)


def net() -> nn.Module:
    """Return the host; a slot follows module "1"."""
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
