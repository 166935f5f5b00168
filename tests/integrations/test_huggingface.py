"""Growth under a Hugging Face Trainer: the bare run where nothing grows, its checkpoints, and what it refuses."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from growth_cases import Returns, Script, growing, images, same
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from kasmina_core import (
    CheckpointError,
    MisuseWarning,
    MorphogeneticModel,
    PlateauPolicy,
    SeedStage,
    Topology,
    clip_gradients,
    tie_optimizer,
)

pytest.importorskip("transformers")

import accelerate
from huggingface_case import (
    PLAN,
    SLOTS,
    Images,
    everything,
    gpt2,
    grower,
    growing_gpt2,
    make_trainer,
    pictures,
    resume,
    texts,
)
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

both_incubations = pytest.mark.parametrize("incubation", ["straight-through", "counterfactual"])
FIRST, SECOND = SLOTS
RETURN = {1: (FIRST, "mlp")}


def images_model(**config: Any) -> MorphogeneticModel:
    return growing(Images(), ("net.norm", "net.norm2"), {"x": images(2)}, **config)


@both_incubations
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_that_of_the_plain_loop(tmp_path: Path, incubation: str, accumulate: int) -> None:
    """With the loss a mean per batch, batches in the trainer's order, and the norm clipped for host and seeds apart."""
    order: list[dict[str, Tensor]] = []

    class Recording(Images):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            if self.training:
                order.append({"x": x, "labels": labels})
            return super().forward(x, labels)

    plan = {1: ("net_norm", "conv"), 3: ("net_norm2", "conv")}
    model = growing(Recording(), ("net.norm", "net.norm2"), {"x": images(2)}, incubation=incubation)
    settings = {
        "gradient_accumulation_steps": accumulate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.1,
    }
    trainer = make_trainer(model, tmp_path, 9, pictures, optim="adamw_torch", **settings)
    grower(Script(plan), pictures).attach(trainer).train()
    assert len(order) == 27

    mirror = images_model(incubation=incubation)
    mirror.load_state_dict(images_model().state_dict())
    optimizer = tie_optimizer(mirror, copy_of(trainer.optimizer, mirror))
    held_out, val = batch_of(pictures(8, 11)), pictures(8, 21)
    mirror.evaluate_with(
        lambda: F.cross_entropy(mirror(held_out["x"])["logits"], held_out["labels"], reduction="none")
    )
    policy, metric = Script(plan), None
    for number, batch in enumerate(order):
        if metric is not None:
            mirror.step_epoch(metric)
            mirror.follow(policy)
            metric = None
        mirror.train()
        within = number % 3
        share = (1 if accumulate == 1 or within == 2 else 2) * trainer.accelerator.gradient_accumulation_steps
        (mirror(**batch)["loss"] / share).backward()
        mirror.incubate(lambda batch=batch, share=share: mirror(**batch)["loss"] / share)
        if accumulate == 1 or within:
            clip_gradients(mirror, 0.1)
            mirror.step()
            optimizer.step()
            optimizer.zero_grad()
        if within == 2:
            mirror.eval()
            with torch.no_grad():
                metric = sum(float(mirror(**batch_of(val[i : i + 4]))["loss"]) for i in (0, 4)) / 2
    assert model.slots["net_norm"].stage is SeedStage.FOSSILIZED
    assert same(strip(mirror.state_dict()), strip(model.state_dict()))


def batch_of(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def copy_of(optimizer: Any, model: MorphogeneticModel) -> torch.optim.Optimizer:
    """An AdamW with the groups that a Trainer makes: with decay and without, which is 0 in both here."""
    wanted = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    named = dict(model.named_parameters())
    groups = [[p for n, p in named.items() if n in wanted], [p for n, p in named.items() if n not in wanted]]
    first = optimizer.param_groups[0]
    return torch.optim.AdamW(
        [{"params": g} for g in groups],
        lr=first["lr"],
        betas=first["betas"],
        eps=first["eps"],
        weight_decay=0.0,
    )


def strip(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


CULLED = Script({1: (FIRST, "mlp")}, {3: FIRST})


@pytest.fixture(scope="module", params=[1, 2], ids=["", "accumulated"])
def bare(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, Any]]:
    """What the trainer makes of the host alone, its gradients clipped as is the trainer's custom."""
    trainer = make_trainer(
        gpt2(0.2), tmp_path_factory.mktemp("bare"), 5, gradient_accumulation_steps=request.param
    )
    trainer.train()
    return request.param, everything(trainer)


@pytest.mark.parametrize(
    ("incubation", "policy"),
    [("straight-through", Script({})), ("straight-through", CULLED), ("counterfactual", CULLED)],
    ids=["no seed", "culled, straight-through", "culled, counterfactual"],
)
def test_a_run_without_a_seed_in_the_end_is_the_bare_run(
    tmp_path: Path, bare: tuple[int, dict[str, Any]], incubation: str, policy: Script
) -> None:
    model = growing_gpt2(0.2, incubation=incubation)
    trainer = make_trainer(model, tmp_path, 5, gradient_accumulation_steps=bare[0])
    grower(copy.deepcopy(policy)).attach(trainer).train()
    assert model.slots[FIRST].germinations == (policy is CULLED)
    found = everything(trainer) | {"weights": model.host.state_dict()}
    for part, value in bare[1].items():
        assert same(found[part], value), part


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run with dropout and shuffled batches, and a checkpoint of every other step."""
    folder = tmp_path_factory.mktemp("whole")
    model = growing_gpt2(0.1, incubation="counterfactual")
    trainer = grower().attach(make_trainer(model, folder, 9, save_strategy="steps", save_steps=2))
    trainer.train()
    assert [slot.stage for slot in model.slots.values()] == [SeedStage.FOSSILIZED, SeedStage.PROBATIONARY]
    assert [g.get("kasmina_slot") for g in trainer.optimizer.param_groups] == [None, None, *SLOTS]
    return folder, everything(trainer)


@pytest.mark.parametrize("step", [4, 8, 10, 16, 20])
def test_a_run_that_goes_on_from_a_checkpoint_is_the_uninterrupted_one(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, step: int
) -> None:
    found = everything(resume(whole[0] / f"checkpoint-{step}", tmp_path, 9))
    for part, value in whole[1].items():
        assert same(found[part], value), part


def returning(folder: Path, **options: Any) -> Trainer:
    model = growing_gpt2(0.1, keep_snapshot=True)
    return grower(Returns(RETURN)).attach(make_trainer(model, folder, 11, **options))


def test_a_late_cull_with_revert_and_a_seed_put_aside_are_as_in_the_uninterrupted_run(tmp_path: Path) -> None:
    first = returning(tmp_path / "first", save_strategy="epoch")
    first.train()
    assert first.model.lost_epochs > 0
    assert first.model.slots[SLOTS[0]].germinations == 2
    for step in (12, 15, 21):
        again = returning(tmp_path / str(step))
        again.train(resume_from_checkpoint=str(tmp_path / "first" / f"checkpoint-{step}"))
        assert same(everything(again), everything(first)), step
    (tmp_path / "first" / "checkpoint-15" / "growth.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-15 lacks growth\.safetensors"):
        returning(tmp_path).train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-15"))


def test_a_fresh_process_goes_on_from_a_checkpoint(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "huggingface_case", str(whole[0] / "checkpoint-14"), str(tmp_path), "9"]
    subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True)
    found = torch.load(tmp_path / "resumed.pt", weights_only=True)
    for part, value in whole[1].items():
        assert same(found[part], value), part


def test_a_checkpoint_is_plain_and_holds_tied_weights_under_both_names(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    folder = whole[0] / "checkpoint-26"
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == set(whole[1]["weights"])
    assert torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])
    record = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]["kasmina"]
    assert record["epoch"] == 8
    assert len(record["policy"]["seen"]) == 8


def test_the_best_model_of_a_run_is_the_one_that_was_measured_and_the_optimiser_follows(
    tmp_path: Path,
) -> None:
    model = growing_gpt2()
    options = {"save_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = grower().attach(make_trainer(model, tmp_path, 9, **options))
    with pytest.warns(MisuseWarning, match="they are gone"):  # the best model is from before growth
        trainer.train()
    evaluated = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert best < 9  # before the second seed
    assert model.slots[SECOND].seed is None
    assert trainer.evaluate()["eval_loss"] == evaluated[best]
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_the_trainer_of_one_run_grows_in_the_next(tmp_path: Path) -> None:
    model = growing_gpt2()
    trainer = grower(Script({1: (FIRST, "mlp"), 4: (SECOND, "mlp")})).attach(make_trainer(model, tmp_path, 3))
    trainer.train()
    before = model.seed_parameters(FIRST)
    assert trainer.train().global_step == 9
    assert model.epoch == 5  # of six evaluations the last waits for a step
    assert [g.get("kasmina_slot") for g in trainer.optimizer.param_groups] == [None, None, *SLOTS]
    assert all(p in trainer.optimizer.state for p in before)


def test_evaluations_without_a_step_before_them_are_no_epochs(tmp_path: Path) -> None:
    policy = Script({})
    trainer = grower(policy).attach(make_trainer(growing_gpt2(), tmp_path, 3, eval_on_start=True))
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert policy.seen == evaluated[1:3]


def test_of_several_evaluation_sets_one_is_watched(tmp_path: Path) -> None:
    sets = {"easy": texts(4, 31), "hard": texts(4, 32)}
    policy = Script({})
    trainer = make_trainer(growing_gpt2(), tmp_path, 3, eval_dataset=sets)
    grower(policy, monitor="eval_easy_loss").attach(trainer).train()
    assert (
        policy.seen == [r["eval_easy_loss"] for r in trainer.state.log_history if "eval_easy_loss" in r][:2]
    )


def test_samples_are_measured_by_the_loss_of_the_trainer_or_by_one_that_is_given(tmp_path: Path) -> None:
    def given(trained: Any, batch: Any) -> Tensor:
        logits, ids = trained(input_ids=batch["input_ids"]).logits, batch["input_ids"]
        return F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)

    gains = []
    for options in ({}, {"losses": given}, {"held_out": DataLoader(texts(8, 11), batch_size=3)}):
        model = growing_gpt2(incubation="counterfactual")
        grower(Script({1: (FIRST, "mlp")}), **options).attach(make_trainer(model, tmp_path, 4)).train()
        gains.append(model.slots[FIRST].last_evidence)
    own, other, loaded = gains
    assert own.samples == other.samples == loaded.samples == 8
    assert other.gain == pytest.approx(own.gain, abs=1e-5)
    assert loaded == own


def test_a_loss_function_of_the_trainer_is_what_seeds_learn_from(tmp_path: Path) -> None:
    calls: list[int] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        calls.append(len(labels))
        total = F.cross_entropy(outputs.logits[:, :-1].mT, labels[:, 1:], reduction="sum")
        return total / (num_items_in_batch if num_items_in_batch is not None else labels[:, 1:].numel())

    model = growing_gpt2(incubation="counterfactual")
    trainer = make_trainer(model, tmp_path, 4, compute_loss_func=loss, gradient_accumulation_steps=2)
    before = len(calls)
    grower(Script({1: (FIRST, "mlp")})).attach(trainer).train()
    assert calls.count(1) > before  # samples one by one
    assert model.slots[FIRST].state.metrics.gradient_norm > 0


def test_optimisers_that_are_given_follow_and_go_on(tmp_path: Path) -> None:
    def make(folder: Path) -> Trainer:
        model = growing_gpt2()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
        return grower().attach(
            make_trainer(model, folder, 6, optimizers=(optimizer, schedule), save_strategy="epoch")
        )

    first = make(tmp_path / "first")
    first.train()
    assert [g.get("kasmina_slot") for g in first.optimizer.param_groups] == [None, *SLOTS]
    assert first.lr_scheduler.base_lrs == [0.1] * 3
    for step in (6, 15):
        again = make(tmp_path / f"again{step}")
        again.train(resume_from_checkpoint=str(tmp_path / "first" / f"checkpoint-{step}"))
        for part, value in everything(first).items():
            assert same(everything(again)[part], value), part


def test_metrics_of_predictions_need_no_cache(tmp_path: Path) -> None:
    def accuracy(predicted: Any) -> dict[str, float]:
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    policy = Script({})
    trainer = make_trainer(
        growing_gpt2(higher_is_better=True),
        tmp_path,
        3,
        compute_metrics=accuracy,
        metric_for_best_model="accuracy",
    )
    trainer.add_callback(EarlyStoppingCallback(9))
    trainer.args.load_best_model_at_end = True
    grower(policy, monitor="eval_accuracy").attach(trainer).train()
    assert policy.seen == [r["eval_accuracy"] for r in trainer.state.log_history if "eval_accuracy" in r][:2]


def test_columns_and_labels_are_those_of_the_host(tmp_path: Path) -> None:
    data = [sample | {"source": "a name"} for sample in pictures(24, 1)]
    trainer = make_trainer(images_model(), tmp_path, 1, lambda n, seed: data[:n])
    grower(Script({}), lambda n, seed: data[:n]).attach(trainer)
    assert trainer.label_names == ["labels"]
    assert not trainer.model_accepts_loss_kwargs
    trainer.train()
    assert "eval_loss" in trainer.state.log_history[-2]


class Around(nn.Module):
    """A module that holds the model somewhere inside, and draws random numbers around it."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.inner = images_model(**config)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return self.inner(self.drop(x), labels)


def test_a_model_within_another_module_grows_and_goes_on(tmp_path: Path) -> None:
    plan = {1: ("net_norm", "conv")}

    def make() -> Trainer:
        trainer = make_trainer(
            Around(incubation="counterfactual"), tmp_path, 6, pictures, save_strategy="epoch"
        )
        return grower(Script(plan), pictures).attach(trainer)

    first = make()
    first.train()
    assert first.model.inner.slots["net_norm"].stage >= SeedStage.BLENDING
    again = make()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    for part, value in everything(first).items():
        assert same(everything(again)[part], value), part


def test_bf16_grows(tmp_path: Path) -> None:
    model = growing_gpt2(incubation="counterfactual")
    trainer = grower().attach(make_trainer(model, tmp_path, 8, bf16=True))
    trainer.train()
    assert model.slots[FIRST].stage >= SeedStage.SHADOWING
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_callback_that_is_listed_says_to_attach_it(tmp_path: Path) -> None:
    trainer = make_trainer(growing_gpt2(), tmp_path, 1)
    trainer.add_callback(grower())
    with pytest.raises(ValueError, match=r"GrowthCallback\(\.\.\.\)\.attach\(trainer\)"):
        trainer.train()


def test_a_callback_is_attached_once(tmp_path: Path) -> None:
    trainer = make_trainer(growing_gpt2(), tmp_path, 1)
    growth = grower()
    assert growth.attach(trainer) is trainer
    for again in (growth, grower()):
        with pytest.raises(ValueError, match="attached once, and a trainer has one"):
            again.attach(trainer)


class Two(Around):
    def __init__(self) -> None:
        super().__init__()
        self.second = images_model()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (gpt2, {}, r"GPT2LMHeadModel holds no MorphogeneticModel.*\n.*slots="),
        (Two, {}, r"Two holds 2 MorphogeneticModels: inner, second"),
        (growing_gpt2, {"eval_strategy": "no"}, r"this trainer runs none.*eval_strategy='epoch'"),
    ],
    ids=["no model", "two models", "no evaluation"],
)
def test_a_trainer_that_cannot_grow_says_why(
    tmp_path: Path, model: Any, options: dict[str, Any], message: str
) -> None:
    trainer = make_trainer(model(), tmp_path, 1, **options)
    with pytest.raises(ValueError, match=message):
        grower().attach(trainer)


def test_more_than_one_device_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(growing_gpt2(), tmp_path, 1)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="this trainer has 2 in one process"):
        grower().attach(trainer)


@pytest.mark.parametrize(
    ("name", "flag"), [("FSDP", "is_fsdp_enabled"), ("DeepSpeed", "is_deepspeed_enabled")]
)
def test_fsdp_and_deepspeed_are_refused_by_name(tmp_path: Path, name: str, flag: str) -> None:
    trainer = make_trainer(growing_gpt2(), tmp_path, 1)
    setattr(trainer, flag, True)
    with pytest.raises(ValueError, match=f"does not grow under {name}"):
        grower().attach(trainer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"monitor": "eval_accuracy"}, r"no metric 'eval_accuracy'.*\n  logged: .*eval_loss.*\n.*monitor="),
        (
            {"losses": lambda model, batch: model(**batch).loss},
            r"shape \(n,\), not shape \(\)\.\n.*reduction='none'",
        ),
        ({"held_out": []}, r"held_out is empty"),
    ],
    ids=["no metric", "mean loss", "nothing held out"],
)
def test_a_run_that_cannot_decide_says_why(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    trainer = grower(**options).attach(make_trainer(growing_gpt2(), tmp_path, 3))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_wrong_arguments_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"Give an instance: PlateauPolicy"):
        grower(PlateauPolicy)
    with pytest.raises(ValueError, match="held_out shuffles"):
        grower(held_out=DataLoader(texts(8, 1), shuffle=True))


def test_held_out_samples_that_are_trained_on_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(growing_gpt2(), tmp_path, 1)
    grower(held_out=DataLoader(trainer.train_dataset)).attach(trainer)
    with pytest.raises(ValueError, match="has samples of the training data"):
        trainer.train()


def test_models_made_anew_and_smoothed_labels_are_refused(tmp_path: Path) -> None:
    made = make_trainer(None, tmp_path, 1, model_init=lambda: growing_gpt2())
    smoothed = make_trainer(growing_gpt2(), tmp_path, 1)
    smoothed.label_smoother = object()
    for trainer in (made, smoothed):
        with pytest.raises(ValueError, match=r"as model=.*give a compute_loss_func"):
            grower().attach(trainer)


def test_a_policy_whose_memory_is_not_plain_is_refused_before_it_is_lost(tmp_path: Path) -> None:
    class Forgetful(Script):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": torch.zeros(1)}

    trainer = grower(Forgetful({})).attach(make_trainer(growing_gpt2(), tmp_path, 1))
    with pytest.raises(TypeError, match=r"Forgetful\.state_dict\(\) must return plain data.*Tensor"):
        trainer.train()


def test_a_record_of_growth_of_another_version_is_refused(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    import shutil

    copied = tmp_path / "checkpoint-12"
    shutil.copytree(whole[0] / "checkpoint-12", copied)
    state = json.loads((copied / "trainer_state.json").read_text())
    state["stateful_callbacks"]["kasmina"]["version"] = 99
    (copied / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"saved:    99, by kasmina '0.1.0'\n  readable: 1, 3"):
        resume(copied, tmp_path, 9)


def test_without_transformers_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "kasmina_core.integrations.huggingface")
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5.2' 'accelerate>=1.1'"):
        importlib.import_module("kasmina_core.integrations.huggingface")


def test_a_bundled_policy_goes_on_where_it_was(tmp_path: Path) -> None:
    def make(folder: Path) -> Trainer:
        policy = PlateauPolicy({Topology.TRANSFORMER: ["mlp"]}, patience=1, min_delta=10.0)
        return grower(policy).attach(make_trainer(growing_gpt2(), folder, 6, save_strategy="epoch"))

    first, again = make(tmp_path / "first"), make(tmp_path / "again")
    first.train()
    assert any(slot.seed is not None for slot in first.model.slots.values())
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-9"))
    assert same(everything(again), everything(first))


def test_what_the_plan_of_these_tests_names_is_there() -> None:
    assert {slot for slot, _ in PLAN.values()} == set(growing_gpt2().slots)


@pytest.mark.parametrize("what", ["as prepared", "what is inside"])
def test_what_accelerate_prepared_is_tied_and_follows(what):
    accelerator = accelerate.Accelerator(cpu=True)
    model = MorphogeneticModel(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()), ["1"], example=torch.ones(2, 1, 8, 8)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    trained, optimizer, scheduler = accelerator.prepare(
        model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    )
    tie_optimizer(model, optimizer, schedulers=[scheduler if what == "as prepared" else scheduler.scheduler])
    model.germinate("1", "conv_light")
    for _ in range(2):
        accelerator.backward(trained(torch.ones(2, 1, 8, 8)).sum())
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_an_average_that_would_not_grow_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class OwnAverage(TrainerCallback):
        def __init__(self, model: nn.Module) -> None:
            self.average = AveragedModel(model)

    model = growing_gpt2()
    trainer = grower().attach(make_trainer(model, tmp_path, 1))
    trainer.add_callback(OwnAverage(model))
    with pytest.raises(ValueError, match=r"^OwnAverage averages weights(.*\n)*.*GrowingAveragedModel"):
        trainer.train()
    assert trainer.state.global_step == 0
