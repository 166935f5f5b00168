"""Growth under a Lightning Trainer: the run of a plain loop, its checkpoints, and what it refuses."""

from __future__ import annotations

import copy
import csv
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from growth_cases import EpochSampler, Returns, Script, image_host, images, labels, same
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Subset, TensorDataset

from kasmina_core import (
    CheckpointError,
    GrowingAveragedModel,
    MorphogeneticModel,
    NoGrowthPolicy,
    PlateauPolicy,
    SeedStage,
    Topology,
    tie_optimizer,
)

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import (  # noqa: E402
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning_case import (  # noqa: E402
    HELD_OUT,
    PLAN,
    Classifier,
    every_epoch,
    everything,
    fit,
    grower,
    losses,
)

pytestmark = [
    # Lightning's own use of a name that torch deprecates.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    # A run that goes on need not keep checkpoints itself.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    # The loaders here are lists in memory; workers would only cost.
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
]
RETURN = {1: ("norm", "conv")}
both_incubations = pytest.mark.parametrize("incubation", ["straight-through", "counterfactual"])


def plain_loop(policy: Script, epochs: int, accumulate: int, **config: Any) -> dict[str, Any]:
    """README's loop on the same task, with the epoch of growth before the next batch."""
    module = Classifier(**config)
    model = module.net
    (optimizer,), (schedule,) = module.configure_optimizers()
    scheduler = schedule["scheduler"]
    tie_optimizer(model, optimizer, schedulers=[scheduler])
    model.evaluate_with(lambda: losses(module, HELD_OUT[0]))
    sampler, x, y = EpochSampler(), images(), labels()
    found: dict[str, Any] = {"losses": [], "validated": []}
    for epoch in range(epochs):
        if epoch:
            model.step_epoch(found["validated"][-1])
            model.follow(policy)
        sampler.set_epoch(epoch)
        model.train()
        for number, batch in enumerate(torch.tensor(list(sampler)).split(8)):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            if number % accumulate == 0:
                optimizer.zero_grad()
            (loss / accumulate).backward()
            model.incubate(lambda batch=batch: losses(module, (x[batch], y[batch])).mean() / accumulate)
            found["losses"].append(loss.detach())
            if (number + 1) % accumulate == 0 or number == 2:
                model.step()
                optimizer.step()
                scheduler.step()
        model.eval()
        with torch.no_grad():
            found["validated"].append(F.cross_entropy(model(images(8, seed=21)), labels(8, seed=22)))
    return found | {"weights": module.state_dict(), "optimizer": optimizer.state_dict()}


@both_incubations
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_that_of_the_plain_loop(tmp_path: Path, incubation: str, accumulate: int) -> None:
    module = Classifier(incubation=incubation)
    trainer = fit(module, [grower()], tmp_path, 9, accumulate_grad_batches=accumulate)
    found = everything(module, trainer)
    expected = plain_loop(Script(PLAN), 9, accumulate, incubation=incubation)
    assert module.net.slots["norm"].stage is SeedStage.FOSSILIZED
    assert module.net.slots["norm2"].stage >= SeedStage.SHADOWING
    assert [g.get("kasmina_slot") for g in trainer.optimizers[0].param_groups] == [None, "norm", "norm2"]
    for part, value in expected.items():
        assert same(found[part], value), part


class Bare(Script):
    """Never grows."""

    def __init__(self) -> None:
        super().__init__({})


CULLED = Script({1: ("norm", "conv")}, {3: "norm"})


@both_incubations
@pytest.mark.parametrize("policy", [Bare(), CULLED], ids=["no seed", "a seed culled from training"])
@pytest.mark.parametrize(
    "clip",
    [{}, {"gradient_clip_val": 0.05}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}],
    ids=["", "norm", "value"],
)
def test_a_run_without_a_seed_in_the_end_is_the_bare_run(
    tmp_path: Path, incubation: str, policy: Script, clip: dict[str, Any]
) -> None:
    def run(module: Classifier, callbacks: list[Any]) -> list[Any]:
        torch.manual_seed(7)  # the stream of dropout
        trainer = fit(module, callbacks, tmp_path, 5, **clip)
        host = module.net.host if isinstance(module.net, MorphogeneticModel) else module.net
        left = everything(module, trainer)
        return [
            left["losses"],
            left["validated"],
            host.state_dict(),
            left["optimizer"],
            torch.get_rng_state(),
        ]

    with torch.random.fork_rng(devices=[]):
        expected = run(Classifier(grow=False, dropout=0.3), [])
        grown = Classifier(dropout=0.3, incubation=incubation)
        found = run(grown, [grower(copy.deepcopy(policy))])
    assert grown.net.slots["norm"].germinations == (policy is CULLED)
    assert same(found, expected)


def test_each_seed_is_clipped_apart_from_the_host(tmp_path: Path) -> None:
    norms: list[dict[str, float]] = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            parts = {"host": module.net.host_parameters()} | {
                name: module.net.seed_parameters(name) for name in module.net.slots
            }
            norms.append(
                {
                    n: float(nn.utils.get_total_norm([p.grad for p in ps if p.grad is not None]))
                    for n, ps in parts.items()
                }
            )

    module = Classifier(incubation="counterfactual")
    fit(
        module,
        [grower(Script({1: ("norm", "conv"), 9: ("norm2", "conv")})), Watch()],
        tmp_path,
        11,
        gradient_clip_val=1e-3,
    )
    assert module.net.slots["norm"].stage is SeedStage.FOSSILIZED
    assert module.net.slots["norm2"].stage is SeedStage.TRAINING
    # While the first seed trains; and when it is a fossil and a second one trains.
    for norm in [norms[8][part] for part in ("host", "norm")] + list(norms[-1].values()):
        assert norm == pytest.approx(1e-3, rel=1e-3)
    assert "configure_gradient_clipping" not in vars(module)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run, with a checkpoint of every epoch in ``<folder>/kept``."""
    folder = tmp_path_factory.mktemp("whole")
    module = Classifier(incubation="counterfactual")
    trainer = fit(module, [grower(), every_epoch(folder / "kept")], folder, 9)
    return folder, everything(module, trainer)


def assert_goes_on_as(resumed: dict[str, Any], expected: dict[str, Any], epoch: int) -> None:
    for part, value in expected.items():
        if part == "losses":
            value = value[3 * (epoch + 1) :]
        if part == "validated":
            value = value[epoch + 1 :]
        assert same(resumed[part], value), part


@pytest.mark.parametrize("epoch", range(8))
def test_a_run_that_goes_on_from_a_checkpoint_is_the_uninterrupted_one(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, epoch: int
) -> None:
    module = Classifier(incubation="counterfactual")
    trainer = fit(module, [grower()], tmp_path, 9, whole[0] / "kept" / f"{epoch}.ckpt")
    assert_goes_on_as(everything(module, trainer), whole[1], epoch)


def test_a_fresh_process_goes_on_from_a_checkpoint(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "lightning_case", str(tmp_path), str(whole[0] / "kept" / "4.ckpt"), "9"]
    subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True)
    assert_goes_on_as(torch.load(tmp_path / "resumed.pt", weights_only=True), whole[1], 4)


@pytest.fixture(scope="module")
def returning(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with dropout in which the host is put back after epoch 5 and the seed comes again after its embargo."""
    folder = tmp_path_factory.mktemp("returning")
    module = Classifier(dropout=0.2, keep_snapshot=True)
    torch.manual_seed(3)
    trainer = fit(module, [grower(Returns(RETURN)), every_epoch(folder / "kept")], folder, 11)
    assert module.net.lost_epochs > 0
    assert module.net.slots["norm"].germinations == 2
    return folder, everything(module, trainer)


@pytest.mark.parametrize("epoch", [4, 5, 7])
def test_a_late_cull_with_revert_and_a_seed_put_aside_are_as_in_the_uninterrupted_run(
    returning: tuple[Path, dict[str, Any]], tmp_path: Path, epoch: int
) -> None:
    module = Classifier(dropout=0.2, keep_snapshot=True)
    kept = returning[0] / "kept" / f"{epoch}.ckpt"
    trainer = fit(module, [grower(Returns(RETURN))], tmp_path, 11, kept)
    assert_goes_on_as(everything(module, trainer), returning[1], epoch)


def test_a_policy_without_memory_cannot_go_on_for_one_with_memory(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"NoGrowthPolicy cannot load.*Give the policy with which"):
        fit(Classifier(), [grower(NoGrowthPolicy())], tmp_path, 9, whole[0] / "kept" / "4.ckpt")


def test_an_earlier_checkpoint_shrinks_a_grown_model_and_its_optimiser_follows(tmp_path: Path) -> None:
    module = Classifier()
    growth = grower()
    trainer = fit(module, [growth, every_epoch(tmp_path / "kept")], tmp_path, 9)
    assert len(trainer.optimizers[0].param_groups) == 3
    module.test_step = module.validation_step  # type: ignore[method-assign]
    trainer.test(module, module.val_dataloader(), ckpt_path=tmp_path / "kept" / "0.ckpt", verbose=False)
    assert [slot.stage for slot in module.net.slots.values()] == [SeedStage.DORMANT] * 2
    assert len(trainer.optimizers[0].param_groups) == 1
    assert sum(len(g["params"]) for g in trainer.optimizers[0].param_groups) == len(list(module.parameters()))
    again = fit(module, [growth], tmp_path, 3)
    assert module.net.epoch == 3  # the one noted in that checkpoint, and two of three validations
    assert [g.get("kasmina_slot") for g in again.optimizers[0].param_groups] == [None, "norm", "norm2"]
    assert len(trainer.optimizers[0].param_groups) == 1


def test_sanity_checks_and_validation_apart_from_fit_are_no_epochs(tmp_path: Path) -> None:
    policy = Script({})
    module = Classifier()
    trainer = fit(module, [grower(policy)], tmp_path, 3, num_sanity_val_steps=2)
    trainer.validate(module, verbose=False)
    assert policy.seen == [float(loss) for loss in module.validated[:2]]
    assert module.net.epoch == 2


def test_validations_within_an_epoch_are_epochs_of_growth(tmp_path: Path) -> None:
    policy = Script({})
    fit(Classifier(), [grower(policy)], tmp_path, 2, val_check_interval=1)
    assert len(policy.seen) == 5  # six validations, the last of which no batch follows


def test_loggers_get_stages_alphas_and_gains_beside_other_callbacks(tmp_path: Path) -> None:
    module = Classifier()
    logger = CSVLogger(tmp_path, name="", version="")
    fit(
        module,
        [LearningRateMonitor(), grower(), EarlyStopping("val_loss", patience=99)],
        tmp_path,
        9,
        logger=logger,
    )
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["growth/norm/stage"]]
    assert [int(float(row["growth/norm/stage"])) for row in rows] == [2, 3, 4, 4, 5, 6, 7, 7]
    assert [float(row["growth/norm/alpha"]) for row in rows] == [0, 0, 0, 0.5, 1, 1, 1, 1]
    assert rows[0]["growth/norm/gain"] == ""
    assert float(rows[-1]["growth/norm/gain"]) == module.net.slots["norm"].last_evidence.gain


def test_gates_measure_in_the_precision_of_the_trainer(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    def noted(module: Any, batch: Any) -> Tensor:
        logits = module.net(batch[0])
        seen.append(logits.dtype)
        return F.cross_entropy(logits, batch[1], reduction="none").float()

    module = Classifier(incubation="counterfactual")
    fit(module, [grower(losses=noted)], tmp_path, 7, precision="bf16-mixed")
    assert set(seen) == {torch.bfloat16}
    assert module.net.slots["norm"].stage >= SeedStage.SHADOWING
    assert all(bool(loss.isfinite()) for loss in module.losses)


class Overflowing(pl.Callback):
    """Makes the seed's gradient infinite."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        for parameter in module.net.seed_parameters():
            parameter.data.fill_(1e30)


def test_a_seed_that_overflows_does_not_make_a_scaler_skip_the_step_of_the_host(tmp_path: Path) -> None:
    def run(module: Classifier, callbacks: list[Any]) -> list[Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        trainer = fit(module, callbacks, tmp_path, 5, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        host = module.net.host if isinstance(module.net, MorphogeneticModel) else module.net
        assert module.losses[0] != module.losses[-1]
        return [
            module.losses,
            host.state_dict(),
            everything(module, trainer)["optimizer"],
            scaler.state_dict(),
        ]

    expected = run(Classifier(grow=False), [])
    for incubation in ("straight-through", "counterfactual"):
        grown = Classifier(incubation=incubation)
        found = run(grown, [grower(copy.deepcopy(CULLED)), Overflowing()])
        assert grown.net.slots["norm"].germinations == 1
        assert same(found, expected)


def test_batchnorm_and_dropout_around_the_model_are_as_before(tmp_path: Path) -> None:
    class Surrounded(Classifier):
        def __init__(self, **config: Any) -> None:
            super().__init__(**config)
            self.before = nn.BatchNorm2d(1)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([self.before(batch[0]), batch[1]], batch_idx)

    def surrounded(module: Any, batch: Any) -> Tensor:
        return losses(module, (module.before(batch[0]), batch[1]))

    module = Surrounded(incubation="counterfactual")
    fit(module, [grower(Script({1: ("norm", "conv")}), losses=surrounded)], tmp_path, 4)
    assert module.net.slots["norm"].last_evidence is not None
    assert int(module.before.num_batches_tracked) == 12
    assert module.before.training


class TwoSides(Classifier):
    """Manual optimisation with an optimiser for another part."""

    automatic_optimization = False

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.automatic_optimization = False
        self.other = nn.Linear(2, 1)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.other.parameters(), 0.1), torch.optim.Adam(self.net.parameters(), 1e-2)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        other, own = self.optimizers()
        for optimizer, loss in (
            (other, lambda: self.other(torch.ones(1, 2)).sum()),
            (own, lambda: F.cross_entropy(self.net(batch[0]), batch[1])),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()


def test_manual_optimisation_with_two_optimisers_grows_the_one_that_holds_the_model(tmp_path: Path) -> None:
    module = TwoSides(incubation="counterfactual")
    trainer = fit(module, [grower()], tmp_path, 9)
    assert module.net.slots["norm"].stage is SeedStage.FOSSILIZED
    assert [len(o.param_groups) for o in trainer.optimizers] == [1, 3]
    assert all(p in trainer.optimizers[1].state for p in module.net.seed_parameters())


# -- what is refused -----------------------------------------------------------------------------------------------


class NoValidation(Classifier):
    val_dataloader = pl.LightningModule.val_dataloader


class EmptyValidation(Classifier):
    def val_dataloader(self) -> Any:
        return []


class Two(Classifier):
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.second = Classifier().net


class Split(Classifier):
    def configure_optimizers(self) -> Any:
        self.automatic_optimization = False
        parts = (
            [self.net[0].parameters(), self.net[1].parameters()]
            if not hasattr(self.net, "host")
            else [self.net.host.stem.parameters(), self.net.host.head.parameters()]
        )
        return [torch.optim.SGD(part, 0.1) for part in parts]


@pytest.mark.parametrize(
    ("module", "callback", "message"),
    [
        (lambda: Classifier(grow=False), grower, r"Classifier holds no MorphogeneticModel.*\n.*slots="),
        (Two, grower, r"holds 2 MorphogeneticModels: net, second\.\n.*model=lambda module"),
        (
            Classifier,
            lambda: grower(model=lambda module: module.net.host),
            r"must return a MorphogeneticModel, but returned a Sequential",
        ),
        (NoValidation, grower, r"this Trainer runs none: define validation_step"),
        (EmptyValidation, grower, r"this Trainer runs none: define validation_step"),
        (
            Classifier,
            lambda: grower(monitor="val_acc"),
            r"no metric 'val_acc'.*\n  logged: train_loss, val_loss\n.*monitor=",
        ),
        (Split, grower, r"2 of 2 optimisers hold parameters.*optimizer=0"),
        (Classifier, lambda: grower(optimizer=1), r"optimizer=1 does not exist.*returned 1"),
        (
            Classifier,
            lambda: grower(Script({1: ("norm", "conv")}), losses=lambda m, b: losses(m, b).mean()),
            r"shape \(n,\), not shape \(\)\.\n.*reduction='none'",
        ),
        (Classifier, lambda: grower(Script({1: ("norm", "conv")}), held_out=[]), r"held_out is empty"),
    ],
    ids=[
        "no model",
        "two models",
        "wrong model",
        "no validation",
        "empty validation",
        "no metric",
        "which optimiser",
        "no such optimiser",
        "mean loss",
        "nothing held out",
    ],
)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_a_run_that_cannot_grow_says_why(
    tmp_path: Path, module: Callable[[], Classifier], callback: Callable[[], Any], message: str
) -> None:
    started = module()
    with pytest.raises(ValueError, match=message):
        fit(started, [callback()], tmp_path, 6)
    assert "configure_gradient_clipping" not in vars(started)


def test_a_chosen_model_among_several_grows(tmp_path: Path) -> None:
    module = Two()
    fit(module, [grower(model=lambda m: m.net, optimizer=-1)], tmp_path, 3)
    assert module.net.slots["norm"].seed is not None
    assert module.second.slots["norm"].seed is None


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (PlateauPolicy, r"an object with decide\(observation\).*Give an instance: PlateauPolicy"),
        (lambda observation: [], r"must be a policy"),
        (None, r"must be a policy.*not None"),
    ],
)
def test_what_is_no_policy_is_refused(policy: Any, message: str) -> None:
    from kasmina_core.integrations.lightning import GrowthCallback

    with pytest.raises(TypeError, match=message):
        GrowthCallback(policy, held_out=HELD_OUT, losses=losses)


def test_held_out_batches_that_change_are_refused() -> None:
    data = TensorDataset(images(), labels())
    with pytest.raises(ValueError, match="held_out shuffles"):
        grower(held_out=DataLoader(data, shuffle=True))
    with pytest.raises(TypeError, match=r"each time it is gone through.*not generator"):
        grower(held_out=(batch for batch in HELD_OUT))
    assert grower(held_out=DataLoader(data)).monitor == "val_loss"


def test_held_out_samples_that_are_trained_on_are_refused(tmp_path: Path) -> None:
    class Trained(Classifier):
        data = TensorDataset(images(), labels())

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Subset(self.data, range(16)), batch_size=8, shuffle=True)

    for judged in (Trained.data, Subset(Subset(Trained.data, range(12, 24)), [3, 4])):
        with pytest.raises(ValueError, match="has samples of the training data") as refused:
            fit(Trained(), [grower(held_out=DataLoader(judged, batch_size=8))], tmp_path, 1)
        assert f"{16 if judged is Trained.data else 1} of which are trained on" in str(refused.value)
    fit(
        Trained(),
        [grower(held_out=DataLoader(Subset(Trained.data, range(16, 24)), batch_size=8))],
        tmp_path,
        1,
    )


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_other_strategies_than_ddp_are_refused_by_name(name: str) -> None:
    class Two:
        world_size = 2
        strategy = type(name, (), {})()

    with pytest.raises(ValueError, match=rf"this Trainer has {name}.\nUse Trainer\(strategy='ddp'\)"):
        grower().setup(Two(), Classifier(), "fit")
    grower().setup(Two(), Classifier(), "validate")


@pytest.mark.parametrize(
    "state",
    [{"version": 99}, {"version": 1}, {"version": 1, "noted": True, "policy": None}, [1]],
    ids=["newer", "truncated", "damaged", "foreign"],
)
def test_a_record_of_growth_that_cannot_be_read_changes_nothing(tmp_path: Path, state: Any) -> None:
    module, growth = Classifier(), grower()
    growth.load_state_dict(state)
    with pytest.raises(CheckpointError, match="record of growth"):
        fit(module, [growth], tmp_path, 2)
    assert module.net.epoch == 0


def test_without_lightning_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "kasmina_core.integrations.lightning")
    with pytest.raises(ImportError, match=r"pip install 'lightning>=2.6'"):
        importlib.import_module("kasmina_core.integrations.lightning")


def test_a_bundled_policy_goes_on_where_it_was(tmp_path: Path) -> None:
    def policy() -> PlateauPolicy:
        return PlateauPolicy({Topology.CNN: ["conv"]}, patience=1, min_delta=10.0)

    folder = tmp_path / "kept"
    module = Classifier()
    trainer = fit(module, [grower(policy()), every_epoch(folder)], tmp_path, 6)
    again = Classifier()
    resumed = fit(again, [grower(policy())], tmp_path, 6, folder / "2.ckpt")
    assert any(slot.seed is not None for slot in module.net.slots.values())
    assert_goes_on_as(everything(again, resumed), everything(module, trainer), 2)


def test_the_bare_host_of_these_tests_is_the_one_that_grows() -> None:
    assert same(image_host().state_dict(), Classifier().net.state_dict())


class OwnAverage(pl.Callback):
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = AveragedModel(pl_module.net)


class HoldsAverage(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.ema = AveragedModel(self.net.host)


@pytest.mark.parametrize(
    ("module", "averages", "name"),
    [
        (Classifier, lambda: WeightAveraging(), "WeightAveraging"),
        (Classifier, lambda: EMAWeightAveraging(decay=0.5), "EMAWeightAveraging"),
        (Classifier, lambda: StochasticWeightAveraging(swa_lrs=1e-3), "StochasticWeightAveraging"),
        (Classifier, OwnAverage, "OwnAverage"),
        (HoldsAverage, pl.Callback, "HoldsAverage"),
    ],
)
@pytest.mark.parametrize("ours_first", [False, True])
def test_averages_that_would_not_grow_are_refused_before_the_first_step(
    tmp_path: Path, module: Any, averages: Any, name: str, ours_first: bool
) -> None:
    started = module()
    callbacks = [grower(), averages()] if ours_first else [averages(), grower()]
    with pytest.raises(ValueError, match=rf"^{name} averages weights(.*\n)*.*GrowingAveragedModel\(model\)"):
        fit(started, callbacks, tmp_path, 3)
    assert not started.losses


class Averages(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.average = GrowingAveragedModel(pl_module.net)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.average.update_parameters(pl_module.net)


def test_an_average_that_grows_goes_with_growth(tmp_path: Path) -> None:
    module, callback = Classifier(), Averages()
    fit(module, [callback, grower()], tmp_path, 6)
    assert callback.average.module.state_dict().keys() == module.net.state_dict().keys()
