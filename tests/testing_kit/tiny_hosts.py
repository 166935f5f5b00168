"""Small hosts for the conformance kit: good ones, and the ways in which a host can be bad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_core import HookedHost, InjectionPoint, SeedSlot, Topology


class Images(HookedHost, nn.Module):
    """Statistics, dropout and an in-place ReLU behind a point: what a host may have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def injection_points(self) -> list[InjectionPoint]:
        return [
            InjectionPoint("early", "norm", 4, Topology.CNN),
            InjectionPoint("late", "conv", 4, Topology.CNN),
        ]

    def example_inputs(self) -> tuple[Tensor]:
        return (torch.linspace(-1.0, 1.0, 50).view(2, 1, 5, 5).to(self.head.weight),)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.norm(self.stem(x))))
        return self.head(self.conv(x).mean((2, 3)))


class Words(HookedHost, nn.Module):
    """Token ids ``(b, t)`` to logits ``(b, t, 7)``; ``looks_ahead`` makes its attention see everything."""

    def __init__(self, looks_ahead: bool = False, claims: bool = True) -> None:
        super().__init__()
        self.looks_ahead, self.claims = looks_ahead, claims
        self.embed = nn.Embedding(7, 4)
        self.qkv = nn.Linear(4, 12)
        self.block = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def injection_points(self) -> list[InjectionPoint]:
        return [InjectionPoint("block", "block", 4, Topology.TRANSFORMER, causal=self.claims)]

    def example_inputs(self) -> tuple[Tensor]:
        return (torch.arange(12).view(2, 6) % 7,)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(tokens)).chunk(3, dim=-1)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=not self.looks_ahead)
        return self.head(self.block(x))


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...]


class WithDataclass(Words):
    """Returns a dataclass, takes keywords, and has parameters that get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))
        self.embed.weight.requires_grad_(False)

    def example_inputs(self) -> dict[str, Tensor]:
        tokens = torch.arange(12).view(2, 6) % 7
        return {"tokens": tokens, "attention_mask": torch.ones_like(tokens)}

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Answer:
        logits = super().forward(tokens)
        return Answer(logits * attention_mask.unsqueeze(-1), (logits,))


class Translates(Words):
    """A decoder that is causal in its own tokens and may see all of the other ones, which are as many."""

    def example_inputs(self) -> dict[str, Tensor]:
        tokens = torch.arange(12).view(2, 6) % 7
        return {"foreign": tokens.flip(1), "tokens": tokens}

    def forward(self, foreign: Tensor, tokens: Tensor) -> Tensor:
        context = self.embed(foreign).mean(1, keepdim=True)
        q, k, v = self.qkv(self.embed(tokens) + context).chunk(3, dim=-1)
        return self.head(self.block(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class Normalises(Words):
    """Has nothing but a normalisation behind its point, which takes out any factor that all features share."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4, eps=0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(tokens))))


# -- bad ones --------------------------------------------------------------------------------------------------------


class CannotBeCopied(Images):
    def __deepcopy__(self, memo: dict[int, Any]) -> Images:
        raise RuntimeError("there is one of me")


class IsCopiedAsItself(Images):
    def __deepcopy__(self, memo: dict[int, Any]) -> Images:
        return self


class PointNowhere(Images):
    def injection_points(self) -> list[InjectionPoint]:
        return [InjectionPoint("early", "nrom", 4, Topology.CNN)]


class TwoPointsOfOneName(Images):
    def injection_points(self) -> list[InjectionPoint]:
        return [InjectionPoint("one", path, 4, Topology.CNN) for path in ("norm", "conv")]


class OtherPointsEachTime(Images):
    def injection_points(self) -> list[InjectionPoint]:
        self.asked = not getattr(self, "asked", False)
        return super().injection_points()[:: 1 if self.asked else -1]


class WithoutExample(Images):
    example_inputs = None  # type: ignore[assignment]


class ExampleOfAnotherShape(Images):
    def example_inputs(self) -> tuple[Tensor]:
        return (torch.zeros(2, 3, 5, 5),)


class ReturnsWholeNumbers(Images):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


class CountsCalls(Images):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        CountsCalls.count += 1
        return super().forward(x) + CountsCalls.count


class UsesAPointTwice(Images):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.conv(self.norm(self.stem(x)))).mean((2, 3)))


class SkipsAPointInTraining(Images):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.head((x if self.training else self.conv(x)).mean((2, 3)))


class DeclaresAnotherWidth(Images):
    def injection_points(self) -> list[InjectionPoint]:
        return [InjectionPoint("early", "norm", 8, Topology.CNN)]


class DeclaresAnotherLayout(Images):
    def injection_points(self) -> list[InjectionPoint]:
        return [InjectionPoint("early", "norm", 5, Topology.TRANSFORMER)]


class RefusesSlots(Images):
    def register_slot(self, name: str, slot: nn.Module) -> None:
        raise NotImplementedError("no slots today")


class OwnsSlots(Images):
    def register_slot(self, name: str, slot: nn.Module) -> None:
        super().register_slot(name, slot)
        self.add_module(f"slot_{name}", slot)


class CountsSlotsInABuffer(Images):
    def register_slot(self, name: str, slot: nn.Module) -> None:
        super().register_slot(name, slot)
        self.calls += 1


class KeepsHooks(Images):
    def unregister_slot(self, name: str) -> None:
        pass


class GoesToEvalMode(Images):
    def register_slot(self, name: str, slot: nn.Module) -> None:
        super().register_slot(name, slot)
        self.norm.eval()


class DrawsNumbers(Images):
    def register_slot(self, name: str, slot: nn.Module) -> None:
        super().register_slot(name, slot)
        torch.rand(1)


class OwnHook:
    """A hook of the host's own that does something to what passes a slot."""

    def __init__(self, kind: str, slot: SeedSlot) -> None:
        self.kind, self.slot = kind, slot

    def __call__(self, module: nn.Module, args: Any, features: Tensor) -> Any:
        slot = self.slot
        if self.kind == "adds":
            return slot(features) + 1e-3
        if self.kind == "asks the seed":
            return slot.seed(features) if slot.seed is not None and slot.alpha == 0 else slot(features)
        if self.kind == "detaches":
            return slot(features.detach())
        if self.kind == "detaches at alpha 1":
            return slot(features.detach() if slot.alpha == 1 else features)
        if self.kind == "drops":
            slot(features)
            return features
        if self.kind == "calls twice":
            slot(features)
            return slot(features)
        raise AssertionError(self.kind)


class OwnHooks(Images):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.handles = kind, {}

    def register_slot(self, name: str, slot: nn.Module) -> None:
        path = {point.name: point.path for point in self.injection_points()}[name]
        hook = OwnHook(self.kind, slot)
        if self.kind == "closure":
            self.handles[name] = self.get_submodule(path).register_forward_hook(lambda _m, _a, x: slot(x))
        elif self.kind != "nothing":
            self.handles[name] = self.get_submodule(path).register_forward_hook(hook)

    def unregister_slot(self, name: str) -> None:
        if name in self.handles:
            self.handles.pop(name).remove()
