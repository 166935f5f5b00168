"""Test cases of a seed's whole life in a host, which the tests of a pack of hosts inherit. Needs pytest."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

import pytest
import torch
from torch import Tensor, nn

from kasmina_core.growth.config import GrowthConfig
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.lifecycle import SeedStage
from kasmina_core.testing.comparing import difference
from kasmina_core.testing.host_with_slots import open_gates
from kasmina_core.training.optim import tie_optimizer
from kasmina_core.verdicts import GateLevel

_EARLY: Final = (SeedStage.DORMANT, SeedStage.GERMINATED, SeedStage.TRAINING)
_LATE: Final = (SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.FOSSILIZED)


def open_config(**changes: Any) -> GrowthConfig:
    """Return gates that every finite measurement passes, after short dwells."""
    gates = open_gates(min_training_epochs=2, min_probation_epochs=2)
    return GrowthConfig(ramp_steps=4, embargo_epochs=2, gates=gates, **changes)


def bring_to(model: MorphogeneticModel, stage: SeedStage, slot: str, blueprint: str) -> None:
    """Walk a dormant slot to a stage by public moves; in BLENDING until alpha is above 0, where the seed shows."""
    if stage is SeedStage.DORMANT:
        return
    model.germinate(slot, blueprint)
    place = model.slots[slot]
    for _ in range(40):
        if place.stage is stage and (stage is not SeedStage.BLENDING or place.alpha > 0.0):
            return
        model.step_epoch(1.0)
        if stage is SeedStage.FOSSILIZED and place.stage is SeedStage.PROBATIONARY:
            model.advance_stage(slot)
    raise AssertionError(f"{stage.name} was not reached: {place.last_gate}")


def shake(model: MorphogeneticModel, size: float = 0.3) -> None:
    """Change seeds by what training could do, so that they are not near the identity."""
    draw = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in model.seed_parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))


def fossilize_on_evidence(
    model: MorphogeneticModel, slot: str, blueprint: str, losses: Callable[[slice], Tensor], lr: float
) -> None:
    """Train until a seed has passed every gate by what was measured, and assert that host and seed go on to learn.

    Args:
        model: The model; its config incubates by the counterfactual pass.
        slot: Where the seed grows.
        blueprint: Id of its blueprint.
        losses: Returns the losses of a slice of the samples: the first 64 are to train, the others held out.
        lr: Learning rate of Adam.
    """
    optimizer = tie_optimizer(model, torch.optim.Adam(model.parameters(), lr=lr))

    def epoch() -> None:
        for _ in range(6):
            optimizer.zero_grad()
            losses(slice(64)).mean().backward()  # type: ignore[no-untyped-call]  # untyped in torch
            model.incubate(lambda: losses(slice(64)).mean())
            model.step()
            optimizer.step()

    model.evaluate_with(lambda: losses(slice(64, None)))
    for _ in range(10):
        epoch()
    model.germinate(slot, blueprint)
    for _ in range(30):
        epoch()
        result = model.step_epoch().get(slot)
        if result is not None and result.gate is GateLevel.G5 and result.passed:
            model.advance_stage(slot)
            break
    assert model.slots[slot].stage is SeedStage.FOSSILIZED, str(result)
    epoch()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    evidence = model.measure(slot)
    assert evidence is not None
    assert evidence.gain > 0


class LifeCase(ABC):
    """One kind of host: how to make it, what it takes, and where it grows from which blueprint."""

    name: str
    slot: str
    blueprint: str

    @abstractmethod
    def host(self) -> nn.Module:
        """Return a host in evaluation mode, with the same weights at each call and outputs that depend on its input."""

    @abstractmethod
    def grow(self, host: nn.Module, **options: Any) -> MorphogeneticModel:
        """Return the host with slots."""

    @abstractmethod
    def run(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Call a model once on the training batch, and return the mean loss and the output."""

    @abstractmethod
    def losses(self, model: nn.Module) -> Tensor:
        """Return the loss of each held-out sample."""

    def open(self, host: nn.Module | None = None, **options: Any) -> MorphogeneticModel:
        """Return a host with empty slots, open gates and held-out samples."""
        model = self.grow(self.host() if host is None else host, config=open_config(), **options)
        model.evaluate_with(lambda: self.losses(model))
        return model

    def grown(
        self, stage: SeedStage = SeedStage.DORMANT, blueprint: str | None = None, **options: Any
    ) -> MorphogeneticModel:
        """Return a model with one seed at a stage, whose parameters are far from those at birth."""
        model = self.open(**options)
        bring_to(model, stage, self.slot, blueprint or self.blueprint)
        shake(model)
        return model

    def output(self, model: nn.Module) -> Tensor:
        """Return what a model computes from the training batch."""
        return self.run(model)[1]

    def learn(self, model: nn.Module, host: nn.Module | None = None) -> dict[str, Tensor]:
        """Run a pass forward and backward; return loss, output and gradients.

        Every parameter must have got one: each of the model, or of its host if that is given.
        """
        torch.manual_seed(5)  # dropout draws the same at each call
        loss, output = self.run(model)
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        learned = {"loss": loss.detach(), "output": output.detach()}
        for name, parameter in (host or model).named_parameters():
            assert parameter.grad is not None, name
            learned[name] = parameter.grad
        return learned

    def trainer(self, model: MorphogeneticModel) -> Callable[[], Tensor]:
        """Return a function that takes one training step and returns its loss."""
        optimizer = tie_optimizer(model, torch.optim.AdamW(model.host_parameters(), lr=self.lr))

        def step() -> Tensor:
            model.train()
            optimizer.zero_grad()
            loss, _ = self.run(model)
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
            model.step()
            optimizer.step()
            return loss.detach()

        return step

    @property
    def lr(self) -> float:
        """Learning rate of `trainer`."""
        return 3e-3


class LifeCases:
    """Test cases of a seed's life in each kind of host; a test class inherits them and gives the hosts.

    Attributes:
        cases: The kinds of host, by name.
    """

    cases: ClassVar[Mapping[str, LifeCase]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each case once for each host."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases.values(), ids=list(self.cases))

    def test_a_seed_learns_in_isolation_blends_in_and_becomes_part_of_the_model(self, case: LifeCase) -> None:
        model = case.open()
        step = case.trainer(model)
        bring_to(model, SeedStage.TRAINING, case.slot, case.blueprint)
        at_birth = [p.detach().clone() for p in model.seed_parameters()]
        first = step()
        for _ in range(20):
            if model.slots[case.slot].stage is SeedStage.FOSSILIZED:
                break
            model.step_epoch(float(step()))
            if model.slots[case.slot].stage is SeedStage.PROBATIONARY:
                model.advance_stage(case.slot)
        assert model.slots[case.slot].stage is SeedStage.FOSSILIZED
        assert any(not torch.equal(a, b) for a, b in zip(at_birth, model.seed_parameters(), strict=True))
        assert step() < first

    def test_after_fossilising_host_and_seed_go_on_to_learn(self, case: LifeCase) -> None:
        model = case.grown(SeedStage.FOSSILIZED).train()
        assert all(tensor.isfinite().all() for tensor in case.learn(model).values())

    def test_a_culled_seed_leaves_the_host_as_if_it_had_never_been(self, case: LifeCase) -> None:
        models = [case.open(), case.open()]
        losses = []
        for model, grows in zip(models, (True, False), strict=True):
            torch.manual_seed(1)
            step = case.trainer(model)
            if grows:
                bring_to(model, SeedStage.TRAINING, case.slot, case.blueprint)
            losses.append([step() for _ in range(3)])
            if grows:
                model.cull(case.slot)
            losses[-1] += [step(), step()]
        assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
        assert not difference(*(model.host.state_dict() for model in models))
        assert not models[0].seed_parameters()

    @pytest.mark.parametrize("stage", _EARLY)
    @pytest.mark.parametrize("training", [False, True])
    def test_before_blending_outputs_and_gradients_are_the_bare_host_s(
        self, case: LifeCase, stage: SeedStage, training: bool
    ) -> None:
        bare, model = case.host().train(training), case.grown(stage).train(training)
        assert not difference(case.learn(bare), case.learn(model, model.host))
        assert not difference(dict(bare.named_buffers()), dict(model.host.named_buffers()))

    @pytest.mark.parametrize("stage", _LATE)
    def test_from_blending_on_the_seed_takes_part(self, case: LifeCase, stage: SeedStage) -> None:
        model = case.grown(stage)
        with_seed = case.output(model)
        with model.bypassed(case.slot):
            without = case.output(model)
        assert torch.equal(without, case.output(case.host()))
        assert not torch.allclose(with_seed, without)

    @pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED])
    def test_a_grown_model_s_state_dict_loads_into_a_fresh_one(
        self, case: LifeCase, stage: SeedStage
    ) -> None:
        model, fresh = case.grown(stage), case.open()
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert fresh.slots[case.slot].stage is stage
        assert torch.equal(case.output(fresh), case.output(model))

    def test_a_model_without_seeds_has_the_bare_host_s_state_dict(self, case: LifeCase) -> None:
        assert list(case.grown().state_dict()) == list(case.host().state_dict())

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("stage", [SeedStage.DORMANT, SeedStage.TRAINING, SeedStage.FOSSILIZED])
    def test_a_copy_computes_the_same_and_lives_its_own_life(
        self, case: LifeCase, stage: SeedStage, clone: Callable[[nn.Module], nn.Module]
    ) -> None:
        model = case.grown(stage)
        twin = clone(model)
        before = case.output(model)
        assert torch.equal(case.output(twin), before)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(case.output(model), before)
        assert not torch.equal(case.output(twin), before)

    def test_detached_slots_leave_the_host_as_it_was(self, case: LifeCase) -> None:
        model = case.grown(SeedStage.FOSSILIZED)
        for host in (copy.deepcopy(model).detach_slots(), model.detach_slots()):
            assert torch.equal(case.output(host), case.output(case.host()))
            assert not [hook for m in host.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]
            case.grow(host)  # it can be grown again
