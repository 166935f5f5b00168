"""Files of seeds without their host, to graft onto the same host elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from kasmina_core.checkpoints.atomic import replacing
from kasmina_core.checkpoints.files import (
    UNSEALED,
    as_checkpoint_error,
    demand_seal,
    open_tensors,
    plain_refusals,
    seal_tensors,
    write_tensors,
)
from kasmina_core.checkpoints.growth_state import (
    OtherBlueprintVersion,
    compare_seed,
    demand_blueprint,
    lacking_topology,
    origin_of,
    saved_slots,
    slot_data,
)
from kasmina_core.checkpoints.migrations import upgraded
from kasmina_core.errors import CheckpointError, KasminaError, warn_caller
from kasmina_core.growth.agreement import no_inference_mode
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.plain_data import FORMAT_VERSION, from_json, to_json
from kasmina_core.growth.slot import SeedSlot
from kasmina_core.lifecycle import SeedStage
from kasmina_core.probing import lookup
from kasmina_core.slotted import name_behind

_KEY: Final = "kasmina_seeds"


def save_seeds(
    file: str | os.PathLike[str], model: MorphogeneticModel, slots: Iterable[str] | None = None
) -> Path:
    """Write seeds, in any stage, without their host: one safetensors file with a CRC-32 of itself, put in place at once.

    Args:
        file: Where to; a file that is there is replaced.
        model: The model in which they grew.
        slots: Names of the slots; default all that hold a seed.

    Returns:
        The file.

    Raises:
        CheckpointError: If a slot holds no seed, or none does, or the file cannot be written.
        UnknownNameError: If there is no such slot.
    """
    chosen = [model.slots[name] for name in ([slots] if isinstance(slots, str) else slots or model.slots)]
    full = [(slot, slot.seed) for slot in chosen if slot.seed is not None]
    if not full or (slots is not None and len(full) < len(chosen)):
        empty = ", ".join(slot.name for slot in chosen if slot.seed is None)
        raise CheckpointError(f"There is no seed to save in: {'all slots' if slots is None else empty}.")
    tensors = {
        f"{slot.name}.{name}": value.clone()
        for slot, seed in full
        for name, value in seed.state_dict().items()
        if isinstance(value, Tensor)
    }
    text = to_json({"version": FORMAT_VERSION, "slots": {s.name: slot_data(s) for s, _ in full}}, "seeds")
    target = Path(file)
    with as_checkpoint_error(f"The file of seeds {target}"), replacing(target) as beside:
        write_tensors(beside, tensors, {_KEY: text, **UNSEALED}, named=target)
        seal_tensors(beside)
    return target


@no_inference_mode()
@plain_refusals()
def graft_seeds(
    file: str | os.PathLike[str], model: MorphogeneticModel, onto: Mapping[str, str] | None = None
) -> list[str]:
    """Put saved seeds into dormant slots of a model; they go on in the stage they were saved in.

    A fossil is part of the model at once; a seed that was in a slot behind it brings that slot along. What gates had measured of a seed that is none is measured anew. Optimisers
    that are tied get the new parameters; other seeds, and their optimiser state, are not touched.

    Args:
        file: What `save_seeds` wrote.
        model: A model with the same points.
        onto: Slot here by slot in the file; default the same names. With it only those that it names are grafted.

    Returns:
        The slots that hold a new seed.

    Raises:
        CheckpointError: If the file is damaged or foreign, a slot is occupied or of another width, topology or
            causality, or a seed's pack is missing. Nothing is changed.
        UnknownNameError: If there is no such slot.

    Warns:
        OtherBlueprintVersion: If a seed fits but comes from another version of its pack.
        UserWarning: If the file is of an older version, which wrote no checksum: a bit that turned is not noticed.
    """
    saved, tensors = _read(Path(file))
    pairs = onto if onto is not None else {name: name for name in saved}
    others: list[str] = []
    grafted: list[SeedSlot] = []
    with model.growth.undone_on_error():
        plans: list[tuple[SeedSlot, Any, dict[str, Any]]] = []
        for source, place in pairs.items():
            data = lookup(source, saved, "saved seed")
            _open_behind_fossils(model, place, [slot for slot, _, record in plans if _is_fossil(record)])
            slot = model.slots[place]
            plans.append((slot, data, _record(slot, source, data)))
        if len({slot.name for slot, *_ in plans}) < len(plans):
            raise CheckpointError(f"Two seeds cannot be grafted onto one slot: {dict(pairs)}.")
        try:
            for (slot, data, record), source in zip(plans, pairs, strict=True):
                start = f"{source}."
                own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
                slot.demand_room(record, sum(t.numel() for t in own.values()))
                grafted.append(slot)
                slot.set_extra_state(record)
                compare_seed(slot, data, others)
                if slot.seed is not None:
                    slot.seed.load_state_dict(own)
            for text in others:
                warn_caller(text, OtherBlueprintVersion)
            model.growth.offer_slots()
        except BaseException as error:
            for slot in grafted:
                if slot.seed is not None:
                    slot.clear()  # takes its parameters out of the optimisers
            if isinstance(error, (RuntimeError, KasminaError)) and not isinstance(error, CheckpointError):
                raise CheckpointError(f"The saved seeds cannot be grafted: {error}") from error
            raise
    return [slot.name for slot in grafted]


def _open_behind_fossils(model: MorphogeneticModel, name: str, coming: Sequence[SeedSlot]) -> None:
    """Open the slot of a name if it would be behind a fossil, or behind one that is about to be grafted."""
    for chain in model.chains() if name not in model.slots else ():
        if name == name_behind(chain) and (chain[-1].stage is SeedStage.FOSSILIZED or chain[-1] in coming):
            model.open_behind(chain[-1])


def _is_fossil(record: Mapping[str, Any]) -> bool:
    return bool(record["state"].get("stage") == SeedStage.FOSSILIZED)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    metadata, tensors = open_tensors(file)
    if (text := metadata.get(_KEY)) is None:
        raise CheckpointError(f"{file} holds no seeds: save_seeds did not write it.")
    if metadata.keys() == {_KEY}:
        warn_caller(
            f"{file} was written before files of seeds had a checksum: a bit that turned in it is not noticed. "
            "save_seeds writes one.",
        )
    else:
        with as_checkpoint_error(f"The file of seeds {file}", "read"):
            demand_seal(file)
    what = f"What {file} says of its seeds"
    data = upgraded("seeds", from_json(text, what), f"The file of seeds {file}")
    return dict(saved_slots(data, what)), {name: t.clone() for name, t in tensors.items()}


def _record(slot: SeedSlot, source: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Check that a seed may be put into a slot, and return its record as that slot's."""
    point, record = data["point"], data["record"]
    if slot.state is not None:
        raise CheckpointError(
            f"Slot '{slot.name}' is not dormant but {slot.stage.name}: it holds '{slot.state.seed_id}'. "
            "A seed can be grafted onto a dormant slot alone."
        )
    here = {"dim": slot.point.dim, "topology": slot.point.topology.value, "causal": slot.point.causal}
    there = {key: point.get(key) for key in here} if isinstance(point, Mapping) else point
    state = record.get("state") if isinstance(record, Mapping) else None
    if here != there:
        blueprint = str(state.get("blueprint_id")) if isinstance(state, Mapping) else "unknown"
        raise CheckpointError(
            f"The seed of slot '{source}' does not fit slot '{slot.name}'.\n"
            f"  saved at: {there!r:.120}\n  here:     {here!r}"
            + lacking_topology(there, blueprint, origin_of(data["blueprint"]))
        )
    if not isinstance(state, Mapping) or state.get("slot") != source:
        raise CheckpointError(f"The saved record of slot '{source}' is damaged or holds no seed.")
    demand_blueprint(slot, str(state.get("blueprint_id")), origin_of(data["blueprint"]))
    count = record.get("germinations")
    return {
        **record,
        "state": {**state, "slot": slot.name},
        "germinations": max(slot.germinations, count) if isinstance(count, int) else count,
        "slot_behind": False,  # it is opened if a seed is grafted there
        "gates": [],
        "evidence_is_fresh": False,
        "isolation_is_fresh": False,
    }
