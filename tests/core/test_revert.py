"""A late cull can put the host back, bit for bit, to what it was before the seed contributed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    cnn_model,
    grow_to,
    images,
    labels,
    registry,
    same_tensors,
    snapshot,
    walk_to,
)
from state_helpers import rewrite

from kasmina_core import (
    CheckpointError,
    Cull,
    InexactResume,
    MisuseWarning,
    NoGrowthPolicy,
    SeedStage,
    TransitionError,
    load_checkpoint,
    save_checkpoint,
    tie_optimizer,
)
from kasmina_core.checkpoints.run_state import Run
from kasmina_core.integrations.growing import GrowthClock

S = SeedStage


class Recorder(list):
    def emit(self, event):
        self.append(event)


class Training:
    """A model with a tied Adam, trained by epochs of two steps."""

    def __init__(self, keep_snapshot=True, make=lambda p: torch.optim.Adam(p, 1e-2), **config):
        self.model = cnn_model(seeds=registry(), keep_snapshot=keep_snapshot, **config)
        self.optimizer = tie_optimizer(self.model, make(self.model.parameters()))
        self.events = Recorder()
        self.model.emit_to(self.events)

    def learn(self, steps=2):
        self.model.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images()), labels()).backward()
            self.model.step()
            self.optimizer.step()

    def epoch(self):
        self.learn()
        self.model.step_epoch(1.0)

    def host(self):
        state = [copy.deepcopy(self.optimizer.state[p]) for p in self.model.host.parameters()]
        return snapshot(self.model.host), state


def grown(stage, **more):
    """A host as it was when its seed entered BLENDING, and two epochs later; the seed is then in ``stage``."""
    run = Training(**more)
    run.learn()
    grow_to(run.model, "norm", S.TRAINING, "conv")
    run.learn()
    walk_to(run.model, "norm", S.BLENDING, alpha=0.0)
    before = run.host()
    run.learn()
    if stage is not S.BLENDING:
        walk_to(run.model, "norm", stage)
    else:
        run.model.slots["norm"].set_alpha(0.5)
    run.learn()
    return run, before


@pytest.mark.parametrize("stage", [S.BLENDING, S.SHADOWING, S.PROBATIONARY])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        lambda p: torch.optim.SGD(p, 1e-2),
    ],
    ids=["adam", "momentum", "sgd"],
)
def test_weights_buffers_and_optimiser_state_of_the_host_are_as_before(stage, make):
    run, before = grown(stage, make=make)
    moved = run.host()
    assert not same_tensors(before, moved)
    run.model.cull("norm", "harmful", revert=True)
    assert same_tensors(before, run.host())
    assert run.model.slots["norm"].stage is S.CULLED
    assert all(p.grad is None for p in run.model.host.parameters())
    assert len(run.optimizer.param_groups) == 1


def test_the_run_goes_on_as_if_it_had_stood_still():
    run, _ = grown(S.PROBATIONARY)
    twin = Training(keep_snapshot=False)
    twin.learn(4)
    run.model.cull("norm", revert=True)
    run.learn()
    twin.learn()
    assert same_tensors(run.host(), twin.host())


def test_without_revert_a_late_cull_leaves_what_the_host_learned():
    run, _ = grown(S.PROBATIONARY)
    learned = run.host()
    run.model.cull("norm", "harmful")
    assert same_tensors(learned, run.host())
    event = run.events[-1] if run.events[-1].type.value == "seed_culled" else run.events[-2]
    assert (event.reverted, event.lost_epochs, run.model.lost_epochs) == (False, 0, 0)


class Culls:
    def decide(self, observation):
        return [Cull("norm", "harmful", revert=True), Cull("norm", "harmful", revert=True)]


def test_the_command_that_put_the_host_back_says_by_how_many_epochs():
    run = Training(ramp_steps=3)
    grow_to(run.model, "norm", S.BLENDING, "conv")
    for _ in range(4):
        run.epoch()
    with pytest.warns(MisuseWarning, match="refused"):  # the second: there is no seed any more
        (done,) = run.model.follow(Culls())
    assert done == Cull("norm", "harmful; 4 epochs of the host's training given up", revert=True)
    assert run.model.lost_epochs == 4


def test_the_lost_epochs_are_told():
    run = Training(ramp_steps=3)
    grow_to(run.model, "norm", S.BLENDING, "conv")
    assert run.model.observe().slots[0].can_revert
    for _ in range(4):
        run.epoch()
    run.model.execute(Cull("norm", "harmful", revert=True))
    (event,) = [event for event in run.events if event.type.value == "seed_culled"]
    assert (event.reverted, event.lost_epochs) == (True, 4)
    assert run.model.lost_epochs == run.model.observe().lost_epochs == 4


@pytest.mark.parametrize("stage", [S.GERMINATED, S.TRAINING])
def test_a_seed_that_never_contributed_is_just_culled(stage):
    run = Training(keep_snapshot=False)
    grow_to(run.model, "norm", stage, "conv")
    run.learn()
    learned = run.host()
    run.model.cull("norm", revert=True)
    assert same_tensors(learned, run.host())
    assert run.model.lost_epochs == 0


def refused(run, says):
    before = run.host(), snapshot(run.model), [s.stage for s in run.model.slots.values()]
    with pytest.raises(TransitionError, match=says):
        run.model.cull("norm", revert=True)
    assert same_tensors(
        before, (run.host(), snapshot(run.model), [s.stage for s in run.model.slots.values()])
    )
    assert not run.model.can_revert("norm")


def test_without_a_snapshot_it_is_refused():
    run, _ = grown(S.SHADOWING, keep_snapshot=False)
    refused(run, "no snapshot of the host was kept. GrowthConfig\\(keep_snapshot=True\\)")


def test_a_fossil_stays():
    run, _ = grown(S.FOSSILIZED)
    refused(run, "cannot be culled: it is FOSSILIZED")


def test_seeds_that_joined_later_are_reverted_first():
    run, before = grown(S.SHADOWING)
    grow_to(run.model, "norm2", S.TRAINING, "conv")
    assert run.model.can_revert("norm")  # a seed that learns apart is in nobody's way
    walk_to(run.model, "norm2", S.SHADOWING)
    run.learn()
    refused(run, "other seeds have begun or ceased to contribute since: norm2-1.\n?.*Revert those")
    run.model.cull("norm2", revert=True)
    run.model.cull("norm", revert=True)
    assert same_tensors(before, run.host())


def test_a_seed_that_contributed_before_goes_back_with_the_host():
    run = Training()
    grow_to(run.model, "norm2", S.FOSSILIZED, "norm")
    run.learn()
    grow_to(run.model, "norm", S.BLENDING, "conv")
    fossil = snapshot(run.model.slots["norm2"].seed)
    state = [copy.deepcopy(run.optimizer.state[p]) for p in run.model.slots["norm2"].seed_parameters()]
    walk_to(run.model, "norm", S.SHADOWING)
    run.learn()
    assert not same_tensors(fossil, snapshot(run.model.slots["norm2"].seed))
    run.model.cull("norm", revert=True)
    assert same_tensors(fossil, snapshot(run.model.slots["norm2"].seed))
    assert same_tensors(state, [run.optimizer.state[p] for p in run.model.slots["norm2"].seed_parameters()])


def test_a_seed_that_learns_apart_keeps_what_it_learned():
    run, _ = grown(S.SHADOWING)
    grow_to(run.model, "norm2", S.TRAINING, "conv")
    run.learn()
    learned = snapshot(run.model.slots["norm2"].seed)
    run.model.cull("norm", revert=True)
    assert same_tensors(learned, snapshot(run.model.slots["norm2"].seed))


def test_copies_and_loads_have_no_snapshot_and_say_so():
    run, _ = grown(S.SHADOWING)
    assert run.model.can_revert("norm")
    twin = copy.deepcopy(run.model)
    assert not twin.can_revert("norm")
    run.model.load_state_dict(run.model.state_dict())
    refused(run, "a copy or a model that was loaded otherwise has none")


def resumed(run, folder, **more):
    """The same run in a fresh model, from a checkpoint."""
    save_checkpoint(folder, run.model, optimizer=run.optimizer)
    twin = Training(**more)
    load_checkpoint(folder, twin.model, optimizer=twin.optimizer)
    return twin


@pytest.mark.parametrize("stage", [S.BLENDING, S.SHADOWING, S.PROBATIONARY])
@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.Adam(p, 1e-2), lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9)]
)
def test_a_run_that_goes_on_from_a_checkpoint_reverts_as_the_other_does(stage, make, tmp_path):
    run, before = grown(stage, make=make)
    twin = resumed(run, tmp_path / "a", make=make)
    for each in (run, twin):
        each.learn()
        each.model.cull("norm", revert=True)
        assert same_tensors(before, each.host())
        each.learn()
    assert same_tensors(run.host(), twin.host())
    assert run.model.lost_epochs == twin.model.lost_epochs


def test_what_can_be_put_back_is_the_same_after_a_second_resume(tmp_path):
    run, before = grown(S.BLENDING)
    twin = resumed(resumed(run, tmp_path / "a"), tmp_path / "b")
    twin.learn()
    twin.model.cull("norm", revert=True)
    assert same_tensors(before, twin.host())


def test_after_a_resume_seeds_that_joined_later_are_still_reverted_first(tmp_path):
    run, before = grown(S.SHADOWING)
    grow_to(run.model, "norm2", S.SHADOWING, "conv")
    run.learn()
    twin = resumed(run, tmp_path / "a")
    refused(twin, "other seeds have begun or ceased to contribute since: norm2-1.\n?.*Revert those")
    twin.model.cull("norm2", revert=True)
    twin.model.cull("norm", revert=True)
    assert same_tensors(before, twin.host())


def test_what_can_never_be_put_back_is_not_saved(tmp_path):
    run = Training()
    grow_to(run.model, "norm2", S.SHADOWING, "norm")
    grow_to(run.model, "norm", S.SHADOWING, "conv")
    run.model.cull("norm2")
    assert not run.model.can_revert("norm")
    assert not resumed(run, tmp_path / "a").model.growth.snapshots


def test_without_its_optimiser_a_checkpoint_puts_back_the_host_alone(tmp_path):
    run, before = grown(S.SHADOWING)
    save_checkpoint(tmp_path / "a", run.model)
    twin = Training()
    load_checkpoint(tmp_path / "a", twin.model)
    twin.model.cull("norm", revert=True)
    assert same_tensors(before[0], snapshot(twin.model.host))


class Watcher:
    """A listener with a memory of its own, which no checkpoint holds."""

    def seed_added(self, slot, parameters): ...

    def seed_removed(self, slot, parameters): ...

    def keep(self, parameters):
        return lambda: None


def test_where_another_listener_must_go_back_too_nothing_is_saved_and_a_warning_says_so(tmp_path):
    run = Training()
    run.model.listen(Watcher())
    grow_to(run.model, "norm", S.SHADOWING, "conv")
    assert run.model.can_revert("norm")
    with pytest.warns(InexactResume, match=r"slot 'norm' with revert=True is not saved: a listener"):
        again = resumed(run, tmp_path / "a")
    assert not again.model.can_revert("norm")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ((), 3, "kept for slot 'norm' cannot be read: it must be a mapping, not 3"),
        (
            ("epoch",),
            "first",
            "kept for slot 'norm' cannot be read: epoch must be a whole number.*, not 'first'",
        ),
        (
            ("contributors",),
            [3],
            r"kept for slot 'norm' cannot be read: contributors\[0\] must be text, not 3",
        ),
        (
            ("tensors",),
            {"host.x": 1},
            r"kept for slot 'norm' cannot be read: tensors\['host.x'\] must be a Tensor, not 1",
        ),
        (("optimizers",), [{"host.x": {}}], "kept for slot 'norm' is damaged: it has no parameter 'host.x'"),
        (
            ("optimizers", 0, "host.stem.weight"),
            3,
            "kept for slot 'norm' cannot be read: optimizers.*must be a mapping by text",
        ),
        (None, "norm2", "kept for slot 'norm2', where no seed blends in"),
        (None, "nowhere", "kept for slot 'nowhere', where no seed blends in"),
    ],
)
def test_a_damaged_copy_of_the_host_is_refused_and_nothing_is_changed(path, value, says, tmp_path):
    run, _ = grown(S.SHADOWING)
    save_checkpoint(tmp_path / "a", run.model, optimizer=run.optimizer)
    file = tmp_path / "a" / "manifest.json"
    manifest = json.loads(file.read_text())
    kept = manifest["snapshots"]
    if path is None:
        kept[value] = kept.pop("norm")
    else:
        *inside, last = ("norm", *path)
        for step in inside:
            kept = kept[step]
        assert last in kept or last == "host.stem.weight"
        kept[last] = value
    rewrite(file, manifest)
    twin = Training()
    before = twin.host(), snapshot(twin.model)
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(tmp_path / "a", twin.model, optimizer=twin.optimizer)
    assert same_tensors(before, (twin.host(), snapshot(twin.model)))


def test_the_snapshot_is_let_go_with_the_seed():
    for stage in (S.FOSSILIZED, S.SHADOWING):
        run, _ = grown(stage)
        if stage is S.SHADOWING:
            run.model.cull("norm")
        assert not run.model.growth.snapshots


def test_other_tensors_than_then_are_refused():
    run, _ = grown(S.SHADOWING)
    run.model.host.register_buffer("more", torch.zeros(2))
    refused(run, "host.more: kept nothing, now \\(2,\\) torch.float32")


def test_what_a_trainers_checkpoint_keeps_of_growth_holds_the_epochs_that_were_given_up():
    run, _ = grown(S.BLENDING)
    run.epoch()
    run.model.cull("norm", revert=True)
    assert run.model.lost_epochs == 1
    clock = GrowthClock(NoGrowthPolicy())
    fresh = Training()
    clock.load_state_dict(Run(fresh.model), clock.state_dict(Run(run.model)))
    assert fresh.model.observe().lost_epochs == 1
