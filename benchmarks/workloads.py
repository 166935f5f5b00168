"""What the benchmarks run: two hosts of twelve blocks, with slots, and the same seeds written into them by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
import torch.nn.functional as F
from kasmina_transformer import TransformerHost
from torch import Tensor, nn

from kasmina_core import (
    GateThresholds,
    GrowthConfig,
    Incubation,
    MorphogeneticModel,
    QualityGates,
    SeedStage,
    tie_optimizer,
)

BLOCKS: Final = 12
ANY_SEED: Final = QualityGates(
    thresholds=GateThresholds(
        min_training_epochs=0,
        min_shadowing_epochs=0,
        min_probation_epochs=0,
        min_samples=2,
        min_gain=-1e9,
        min_t=-1e9,
        max_harm_t=1e9,
        max_output_deviation=1e9,
    )
)
"""Gates that let any seed pass: what a stage costs does not depend on what the seed is worth."""


@final
@dataclass(frozen=True, slots=True)
class Size:
    """How large the hosts and their batches are."""

    width: int
    image: int
    images: int
    dim: int
    length: int
    sequences: int


SIZES: Final[Mapping[str, Size]] = {
    "tiny": Size(width=8, image=4, images=2, dim=16, length=8, sequences=2),
    "small": Size(width=16, image=16, images=16, dim=64, length=64, sequences=8),
    "large": Size(width=128, image=32, images=128, dim=768, length=512, sequences=8),
}


class Block(nn.Module):
    """``x + relu(norm(conv3x3(x)))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features."""
        return x + F.relu(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    """A residual classifier of images whose blocks all have one width and one image size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images ``x``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class ByHand(nn.Module):
    """What somebody would write who puts seeds into a host without this library."""

    def insert(
        self, seeds: Mapping[int, nn.Module], stage: SeedStage, detach: bool, straight: bool = False
    ) -> None:
        """Take the seeds of some blocks in, as they compute in ``stage``.

        In TRAINING a seed's output stands in place of the host's, or gets the gradient of the host's if ``straight``.
        """
        self.seeds = nn.ModuleDict({str(at): seed for at, seed in seeds.items()})
        self.stage, self.detach, self.straight = stage, detach, straight
        self.register_buffer("alpha", torch.tensor(0.5))

    def grown(self, at: int, x: Tensor) -> Tensor:
        """Return the features behind block ``at``."""
        if str(at) not in self.seeds:
            return x
        seed = self.seeds[str(at)]
        if self.stage is SeedStage.BLENDING:
            return torch.lerp(x, seed(x.detach() if self.detach else x), self.alpha)
        if self.stage is SeedStage.TRAINING:
            output = seed(x.detach())
            return x + (output - output.detach()) if self.straight else output
        return seed(x)


class ConvNetByHand(ByHand, ConvNet):
    """`ConvNet` with seeds written into it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images ``x``."""
        x = self.stem(x)
        for at, block in enumerate(self.blocks):
            x = self.grown(at, block(x))
        return self.head(x.mean((2, 3)))


class TransformerByHand(ByHand, TransformerHost):
    """`TransformerHost` with seeds written into it."""

    def forward(self, idx: Tensor) -> Tensor:
        """Return the logits of the next token at each position of ``idx``."""
        x = self.tok_emb(idx) + self.pos_emb(torch.arange(idx.shape[1], device=idx.device))
        for at, layer in enumerate(self.layers):
            x = self.grown(at, layer(x))
        return self.head(self.norm(x))


@final
class Workload:
    """A host of twelve blocks, a seed for it and a batch.

    Args:
        kind: ``"cnn"`` or ``"transformer"``.
        size: How large.
        device: Where.
    """

    def __init__(self, kind: str, size: Size, device: torch.device) -> None:
        self.kind, self.size, self.device = kind, size, device
        self.is_cnn = kind == "cnn"
        self.blueprint = "cnn:conv_light" if self.is_cnn else "transformer:mlp"
        self.path = "blocks" if self.is_cnn else "layers"
        draw = torch.Generator().manual_seed(1)
        if self.is_cnn:
            inputs = torch.randn(size.images, 3, size.image, size.image, generator=draw)
            targets = torch.randint(0, 10, (size.images,), generator=draw)
            self.features = (size.images, size.width, size.image, size.image)
        else:
            inputs = torch.randint(0, 256, (size.sequences, size.length), generator=draw)
            targets = torch.randint(0, 256, (size.sequences, size.length), generator=draw)
            self.features = (size.sequences, size.length, size.dim)
        self.inputs, self.targets = inputs.to(device), targets.to(device)

    def host(self, by_hand: bool = False) -> nn.Module:
        """Return the bare host, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.is_cnn:
                made: nn.Module = (ConvNetByHand if by_hand else ConvNet)(self.size.width)
            else:
                kind = TransformerByHand if by_hand else TransformerHost
                made = kind(dim=self.size.dim, n_layers=BLOCKS, max_len=self.size.length)
        return made.to(self.device)

    def places(self, count: int) -> list[int]:
        """Return the blocks behind which ``count`` slots lie: spread evenly."""
        return [(i + 1) * BLOCKS // count - 1 for i in range(count)]

    def model(self, count: int, **config: Any) -> MorphogeneticModel:
        """Return the host with ``count`` dormant slots."""
        return MorphogeneticModel(
            self.host(),
            [f"{self.path}.{at}" for at in self.places(count)],
            example=self.inputs[:2],
            config=GrowthConfig(**{"gates": ANY_SEED, "isolation_every": 0} | config),
            causal=not self.is_cnn,
        )

    def grown(
        self,
        count: int,
        stage: SeedStage,
        incubation: Incubation = Incubation.STRAIGHT_THROUGH,
        joint: bool = False,
    ) -> MorphogeneticModel:
        """Return the host with a seed in each of ``count`` slots, all in ``stage``."""
        model = self.model(count, incubation=incubation, joint_incubation=joint)

        def evaluate() -> Tensor:
            return self.losses(model(self.inputs))

        model.evaluate_with(evaluate)
        for name in model.slots:
            self.walk(model, name, stage)
        return model

    def walk(self, model: MorphogeneticModel, name: str, stage: SeedStage) -> None:
        """Take a slot's seed to a stage, germinating it where there is none; blending stops at alpha 0.5."""
        slot = model.slots[name]
        if slot.seed is None:
            model.germinate(name, self.blueprint)
        while slot.stage is not stage:
            if slot.stage is SeedStage.BLENDING:
                slot.set_alpha(1.0)
            if slot.stage is SeedStage.PROBATIONARY:
                slot.step_epoch()
            result = model.advance_stage(name)
            if not result:
                raise RuntimeError(f"'{name}' stays in {slot.stage.name}: {result}")
        if stage is SeedStage.BLENDING:
            slot.set_alpha(0.5)

    def by_hand(self, seeds: Sequence[nn.Module], stage: SeedStage, straight: bool = False) -> ByHand:
        """Return the host with copies of seeds written into it, where a model with as many slots has them."""
        twin = self.host(by_hand=True)
        assert isinstance(twin, ByHand)
        placed = dict(zip(self.places(len(seeds)), copy.deepcopy(seeds), strict=True))
        twin.insert(placed, stage, self.is_cnn, straight)
        return twin.to(self.device)

    def losses(self, logits: Tensor) -> Tensor:
        """Return the loss of each sample, ``(b,)``."""
        if self.is_cnn:
            return F.cross_entropy(logits, self.targets, reduction="none")
        return (
            F.cross_entropy(logits.flatten(0, 1), self.targets.flatten(), reduction="none")
            .view(self.targets.shape)
            .mean(1)
        )

    def loss(self, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the mean loss of the batch."""
        return F.cross_entropy(forward(self.inputs).flatten(0, -2), self.targets.flatten())

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(
        self, module: nn.Module, forward: Callable[[Tensor], Tensor] | None = None
    ) -> Callable[[], None]:
        """Return a training step of a module; ``forward`` is it compiled.

        AdamW, a parameter group for each seed, in a grown model and in one by hand.
        """
        run = forward if forward is not None else module
        model = module if isinstance(module, MorphogeneticModel) else None
        if model is not None:
            optimizer = tie_optimizer(model, torch.optim.AdamW(model.host_parameters(), 1e-4))
        else:
            optimizer = torch.optim.AdamW(_groups(module), 1e-4)

        def step() -> None:
            optimizer.zero_grad()
            self.loss(run).backward()
            if model is not None:
                model.incubate(lambda: self.loss(run))
                model.step()
            optimizer.step()

        return step

    def seeds_alone(
        self, seeds: Sequence[nn.Module], compiled: Callable[[nn.Module], Callable[[Tensor], Tensor]]
    ) -> Callable[[], None]:
        """Return a training step of copies of seeds, each on features of its own, no host around them."""
        seeds = copy.deepcopy(seeds)
        runs = [compiled(seed) for seed in seeds]
        draw = torch.Generator().manual_seed(2)
        features, gradient = (torch.randn(self.features, generator=draw).to(self.device) for _ in range(2))
        optimizer = torch.optim.AdamW([{"params": list(seed.parameters())} for seed in seeds], 1e-4)

        def step() -> None:
            optimizer.zero_grad()
            # As in a host: what the seeds computed is kept until all of them have.
            torch.autograd.backward([run(features) for run in runs], [gradient] * len(runs))
            optimizer.step()

        return step

    def counterfactual_by_hand(self, seeds: Sequence[nn.Module]) -> Callable[[], None]:
        """Return the counterfactual passes of seeds, written by hand, with their optimiser."""
        twins = []
        for at, seed in zip(self.places(len(seeds)), copy.deepcopy(seeds), strict=True):
            twin = self.by_hand([], SeedStage.TRAINING)
            twin.seeds[str(at)] = seed
            twin.eval()
            seed.train()
            twins.append((twin, list(seed.parameters())))
        optimizer = torch.optim.AdamW([{"params": own} for _, own in twins], 1e-4)

        def step() -> None:
            optimizer.zero_grad()
            for twin, own in twins:
                self.loss(twin).backward(inputs=own)
            optimizer.step()

        return step


def seeds_of(model: MorphogeneticModel) -> list[nn.Module]:
    """Return the seeds of a model, by slot."""
    return [slot.seed for slot in model.slots.values() if slot.seed is not None]


def _groups(module: nn.Module) -> Iterable[dict[str, Any]]:
    seeds = list(module.seeds.values()) if isinstance(module, ByHand) else []
    of_seeds = {id(p) for seed in seeds for p in seed.parameters()}
    yield {"params": [p for p in module.parameters() if id(p) not in of_seeds]}
    for seed in seeds:
        yield {"params": list(seed.parameters())}
