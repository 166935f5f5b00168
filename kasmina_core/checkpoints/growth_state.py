"""Growth of a model without its weights, as plain data and back."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

from torch import Tensor, nn

from kasmina_core.blueprints.declarations import RegisteredBlueprint
from kasmina_core.checkpoints.migrations import part, upgraded
from kasmina_core.errors import CheckpointError, KasminaError, did_you_mean, warn_caller
from kasmina_core.growth.journal import Journal
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.plain_data import FORMAT_VERSION
from kasmina_core.growth.record import SlotRecord
from kasmina_core.growth.slot import SeedSlot, WeighedRecord
from kasmina_core.hosts import InjectionPoint
from kasmina_core.lifecycle import is_failure_stage
from kasmina_core.records import Count, read
from kasmina_core.slotted import SLOTS_KEY
from kasmina_core.state_keys import plain_name
from kasmina_core.topology import Topology

_SAFE_IN_A_COMMAND: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]{0,99}")


class OtherBlueprintVersion(UserWarning):
    """A seed was rebuilt from another version of its blueprint's pack than the one it was saved with."""


def growth_of(model: MorphogeneticModel) -> dict[str, Any]:
    """Return what has grown in a model: each slot's point, its seed's life and blueprint, and the model's counters.

    Plain data, which JSON holds as `plain_data.to_json` writes it. `rebuild_growth` makes a fresh model of the same
    host grow the same seeds, with the weights they had at birth, which are the same in every process.
    """
    return {
        "version": FORMAT_VERSION,
        "slots": {name: slot_data(slot) for name, slot in model.slots.items()},
        **_counters(model),
    }


def counters_of(model: MorphogeneticModel) -> dict[str, Any]:
    """Return what a model counts that its ``state_dict`` does not hold, as plain data for `restore_counters`."""
    germinations = {name: slot.germinations for name, slot in model.slots.items()}
    return {**_counters(model), "germinations": germinations}


def restore_counters(model: MorphogeneticModel, data: Any) -> None:
    """Set what `counters_of` returned.

    Raises:
        CheckpointError: If it is damaged; nothing is changed.
    """
    counters = _checked_counters(data)
    germinations = read(dict[str, Count], data.get("germinations"), _RECORD, "germinations")
    set_counters(model, counters)
    for name, slot in model.slots.items():
        if slot.state is None:  # in a file of tensors alone an empty slot leaves nothing
            slot.germinations = germinations.get(name, slot.germinations)


Counters = dict[str, Any]
"""Values of attributes of `Growth`, by name."""

_COUNTERS: Final = {
    "epoch": Count,
    "events": Count,
    "lost_epochs": Count,
    "last_metric": float | None,
    "metrics": tuple[tuple[int, float], ...],
    "steps": Count,
    "journal": Journal,
}
_EARLIER: Final[Mapping[str, Any]] = {"metrics": [], "steps": 0, "journal": Journal().to_dict()}
"""What stands for counters that earlier versions did not write."""

_RECORD: Final = "The saved record of growth"


def _counters(model: MorphogeneticModel) -> dict[str, Any]:
    return {
        "epoch": model.epoch,
        "events": model.growth.sequence,
        "lost_epochs": model.lost_epochs,
        "last_metric": model.growth.last_metric,
        "metrics": [list(noted) for noted in model.growth.metrics],
        "steps": model.growth.steps,
        "journal": model.growth.journal.to_dict(),
    }


def _checked_counters(data: Any) -> Counters:
    saved = {**_EARLIER, **(data if isinstance(data, Mapping) else {})}
    counters = {name: read(hint, saved.get(name), _RECORD, name) for name, hint in _COUNTERS.items()}
    counters["sequence"] = counters.pop("events")
    return counters


def set_counters(model: MorphogeneticModel, counters: Counters) -> None:
    """Set epochs, events, lost epochs, metrics, steps and the journal."""
    vars(model.growth).update(counters)


def present_counters(model: MorphogeneticModel) -> Counters:
    """Return what `set_counters` sets."""
    names = {*_COUNTERS, "sequence"} - {"events"}
    return {name: getattr(model.growth, name) for name in names}


def slot_data(slot: SeedSlot) -> dict[str, Any]:
    """Return the part of `growth_of` for one slot."""
    data: dict[str, Any] = {
        "point": _point_data(slot.point),
        "record": slot.get_extra_state(),
        "blueprint": None,
        "tensors": {name: list(t.shape) for name, t in _tensors(slot.seed)},
    }
    if slot.seed is not None and slot.state is not None:
        with suppress(KasminaError):  # a seed outlives the registration of its blueprint
            entry = slot.maker.registry.get(slot.state.blueprint_id)
            data["blueprint"] = {"distribution": entry.distribution, "version": entry.version}
    return data


def _tensors(seed: nn.Module | None) -> list[tuple[str, Tensor]]:
    if seed is None:
        return []
    named = seed.state_dict().items()
    return [(name, t) for name, t in named if isinstance(t, Tensor) and not name.endswith("_extra_state")]


def _point_data(point: InjectionPoint) -> dict[str, Any]:
    return {
        "path": plain_name(point.path),
        "dim": point.dim,
        "topology": point.topology.value,
        "causal": point.causal,
    }


def rebuild_growth(model: MorphogeneticModel, data: Mapping[str, Any]) -> None:
    """Make a model's slots and counters what `growth_of` found in another model of the same host.

    Seeds are built anew and have the weights of their birth; the model's optimisers, if they are tied, get their
    parameters. Slots that the data does not name are emptied. The host's weights stay as they are.

    Raises:
        CheckpointError: If the data is damaged, a slot or a blueprint is not there or another one, or a seed does not
            fit. Nothing is changed.

    Warns:
        OtherBlueprintVersion: If a seed fits but comes from another version of its pack.
    """
    with model.growth.undone_on_error(), rebuilding(model, data, lambda _: sys.maxsize) as records:
        model.load_state_dict(records, strict=False)


def topology_of(model: MorphogeneticModel) -> dict[str, Any]:
    """Return what `growth_of` does; deprecated."""
    warn_caller("topology_of is now called growth_of.", DeprecationWarning)
    return growth_of(model)


def rebuild_topology(model: MorphogeneticModel, data: Mapping[str, Any]) -> None:
    """Do what `rebuild_growth` does; deprecated."""
    warn_caller("rebuild_topology is now called rebuild_growth.", DeprecationWarning)
    rebuild_growth(model, data)


@contextmanager
def rebuilding(
    model: MorphogeneticModel, data: Mapping[str, Any], room: Callable[[str], int] | None = None
) -> Iterator[OrderedDict[str, Any]]:
    """Check what has grown, and yield the slots' records for the one call of ``load_state_dict`` in the block.

    A seed with more values than ``room`` returns for its slot is refused before it is built; one that does not fit when
    it is built makes the load fail. The counters are set when the block ends well. Slots behind others are opened at once;
    the caller undoes it if the block fails.
    """
    slots, counters = _checked(model, data)
    records: OrderedDict[str, Any] = OrderedDict()
    for name, saved in slots.items():
        if name in model.slots:
            record = saved["record"]
            if room is not None:
                model.slots[name].demand_room(record, room(name))
                record = WeighedRecord(record)
            records[f"{SLOTS_KEY}.{name}._extra_state"] = record
    others: list[str] = []

    def fits(loaded: nn.Module, _keys: Any) -> None:
        for name, slot in model.slots.items():
            if name in slots:
                compare_seed(slot, slots[name], others)

    # A hook that raises makes the load undo itself.
    handle = model.register_load_state_dict_post_hook(fits)  # type: ignore[no-untyped-call]  # torch
    try:
        yield records
    finally:
        handle.remove()
    for text in others:
        warn_caller(text, OtherBlueprintVersion)
    set_counters(model, counters)  # last: a warning may be an error


def _checked(model: MorphogeneticModel, data: Mapping[str, Any]) -> tuple[dict[str, Any], Counters]:
    data = upgraded("growth", data, _RECORD)
    counters = _checked_counters(data)
    slots = saved_slots(data, _RECORD)
    records = {name: SlotRecord.for_slot(saved["record"], name) for name, saved in slots.items()}
    model.nest(lambda name: name in records and records[name].slot_behind)
    for name, record in records.items():
        saved = slots[name]
        if record.state is None and not record.germinations and name not in model.slots:
            continue  # an empty slot that was never used may be left out
        if name not in model.slots:
            raise CheckpointError(
                f"The saved model has a slot '{name}', and this one has none of that name."
                f"{did_you_mean(name, model.slots)}"
            )
        slot = model.slots[name]
        if record.state is not None:
            _compare_points(slot, saved["point"], record.state.blueprint_id, origin_of(saved["blueprint"]))
        if record.state is not None and not is_failure_stage(record.state.stage):
            demand_blueprint(slot, record.state.blueprint_id, origin_of(saved["blueprint"]))
    return dict(slots), counters


def saved_slots(data: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Return the ``slots`` of what was read, each of which has the entries of `slot_data`."""
    slots: Mapping[str, Any] = part(data, "slots", Mapping, what)
    for name, saved in slots.items():
        if not isinstance(saved, Mapping) or not {"point", "record", "blueprint", "tensors"} <= set(saved):
            raise CheckpointError(f"{what} is damaged: slot {name!r:.80} cannot be {saved!r:.80}.")
    return slots


def _compare_points(slot: SeedSlot, saved: Any, blueprint_id: str, origin: str) -> None:
    here = _point_data(slot.point)
    if isinstance(saved, Mapping) and dict(saved) == here:
        return
    raise CheckpointError(
        f"Slot '{slot.name}' is at another point than in the saved model.\n"
        f"  saved: {saved!r:.160}\n"
        f"  here:  {here!r}\n"
        f"Build the host and the slots as they were when the model was saved.{lacking_topology(saved, blueprint_id, origin)}"
    )


def lacking_topology(saved: Any, blueprint_id: str, origin: str) -> str:
    """Return a line that names the pack to install if a saved point's topology is known to no pack here; else nothing.

    Args:
        saved: The point, as it was written.
        blueprint_id: Id of the blueprint of the seed there.
        origin: What it came from, see `origin_of`.
    """
    name = saved.get("topology") if isinstance(saved, Mapping) else None
    if not isinstance(name, str) or name in {topology.value for topology in Topology}:
        return ""
    way = f"install {origin} from where you have the pack" if origin else "register it before loading"
    return f"\nNo pack that is loaded here has the topology {name!r:.60}. The seed is from pack '{blueprint_id.partition(':')[0]}': {way}."


def origin_of(saved: Any) -> str:
    """Return what a blueprint came from: ``"distribution==version"`` for pip, ``"distribution"``, or nothing."""
    parts = [saved.get(key) for key in ("distribution", "version")] if isinstance(saved, Mapping) else []
    # People paste this into a shell: a file must not be able to make up a command.
    named = [part for part in parts if isinstance(part, str) and _SAFE_IN_A_COMMAND.fullmatch(part)]
    return "==".join(named) if named and named[0] == parts[0] else ""


def demand_blueprint(slot: SeedSlot, blueprint_id: str, origin: str) -> RegisteredBlueprint:
    """Return the blueprint of a saved seed.

    Raises:
        CheckpointError: If it cannot be had; the message names what to install.
    """
    try:
        return slot.maker.registry.get(blueprint_id)
    except KasminaError as error:
        install = (
            f"It came from {origin}: install that from where you have the pack."
            if origin
            else "It came from no installed distribution: register its pack before loading."
        )
        raise CheckpointError(
            f"The seed of slot '{slot.name}' is made from a blueprint that cannot be had here.\n"
            f"  blueprint: {blueprint_id}\n  {install}\n  cause: {error}"
        ) from error


def compare_seed(slot: SeedSlot, saved: Mapping[str, Any], others: list[str]) -> None:
    """Raise a CheckpointError if a seed that was built anew has other parameters than `slot_data` returned.

    A text is added to ``others`` if it fits but comes from another version of its pack.
    """
    if slot.seed is None or slot.state is None:
        return
    entry = demand_blueprint(slot, slot.state.blueprint_id, origin_of(saved["blueprint"]))
    then = origin_of(saved["blueprint"])
    now = origin_of({"distribution": entry.distribution, "version": entry.version})
    versions = f"  saved with: {then or 'no distribution'}\n  here:       {now or 'no distribution'}"
    tensors = {name: list(t.shape) for name, t in _tensors(slot.seed)}
    if saved["tensors"] != tensors:
        wanted = saved["tensors"] if isinstance(saved["tensors"], Mapping) else {}
        different = sorted(name for name in {*wanted, *tensors} if wanted.get(name) != tensors.get(name))
        lines = [f"  {n}: {wanted.get(n)!r:.60} saved, {tensors.get(n)} here\n" for n in different[:5]]
        raise CheckpointError(
            f"Blueprint '{entry.id}' in slot '{slot.name}' makes other parameters than when it was saved.\n"
            f"{versions}\n{''.join(lines)}"
            + (
                f"Install what it was saved with, {then}, from where you have the pack."
                if then and then != now
                else ""
            )
        )
    if then != now:
        others.append(
            f"The seed of slot '{slot.name}' is rebuilt from another version of blueprint '{entry.id}'; its parameters "
            f"fit, but what it computes may differ.\n{versions}"
        )
