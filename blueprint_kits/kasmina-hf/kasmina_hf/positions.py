"""Refusal of input under which a seed that mixes positions would silently compute something else.

A slot hands its seed the features alone. Decoding with a key-value cache, these are the features of the new tokens:
a seed that looks at other positions (attention, a convolution along the sequence) then misses all those before. And
it cannot know which positions are padding. Seeds that treat each position by itself are not concerned.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, Final, final
from weakref import WeakKeyDictionary

import torch
from kasmina_core import ForwardMode, HostError, SeedSlot, Topology
from torch import Tensor, nn

HOST_FEATURES_MODES: Final = (ForwardMode.PASS, ForwardMode.STRAIGHT_THROUGH)
"""Values of ``SeedSlot.mode`` in which the slot's output is the host's: the seed is absent or contributes nothing."""

IDLE_MODE: Final = ForwardMode.PASS
"""The value of ``SeedSlot.mode`` in which the seed does not run."""

PROBE_POSITIONS: Final = 64
TOLERANCE: Final = 1e-4

_CACHES: Final = ("cache", "past_key_values", "cache_params", "mems")  # the first from transformers 5.24 on
_MASKS: Final = ("attention_mask", "decoder_attention_mask")
_mixes: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # else a whole graph cannot be compiled
def mixes_positions(seed: nn.Module, dim: int) -> bool:
    """Return whether what a seed computes at a position may depend on other positions, or on where it is.

    A copy of the seed with random weights runs on a random sequence and on parts of it: features of a part must be
    the same. With random weights since a seed at birth changes nothing at all. A seed that cannot be tried counts as
    one that mixes. The answer is remembered.

    Args:
        seed: Maps ``(b, t, d)`` to the same.
        dim: Its width ``d``.
    """
    known = _mixes.get(seed)
    if known is None:
        known = _mixes[seed] = _try_to_mix(seed, dim)
    return known


@torch.no_grad()
def _try_to_mix(seed: nn.Module, dim: int) -> bool:
    try:
        trial = copy.deepcopy(seed).float().eval()
        device = next((p.device for p in trial.parameters()), torch.device("cpu"))
        devices = [device] if device.type not in ("cpu", "meta") else []
        with (
            torch.random.fork_rng(devices, device_type=device.type),
            torch.autocast(device.type, enabled=False),
        ):
            torch.manual_seed(0)
            for parameter in trial.parameters():
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
                parameter.normal_(std=fan_in**-0.5)
            features = torch.randn(1, PROBE_POSITIONS, dim, device=device)
            whole = trial(features)
            return not all(_agree(trial(features[:, k:]), whole[:, k:]) for k in (1, PROBE_POSITIONS - 1))
    except Exception:
        return True


def _agree(part: Tensor, whole: Tensor) -> bool:
    return bool((part - whole).norm() <= TOLERANCE * whole.norm())


@final
class PositionGuard:
    """A forward pre-hook of a host that refuses what a slot's seed could not treat rightly.

    It speaks up only while the seed runs and mixes positions:

    - with a cache that holds earlier positions, unless the slot's output is the host's anyway;
    - with padding that the seed would look at: any, or where the slot is causal, padding before a token.

    Args:
        slot: The slot.
    """

    def __init__(self, slot: SeedSlot) -> None:
        self.slot = slot

    def __call__(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        slot = self.slot
        if slot.mode == IDLE_MODE or slot.seed is None or not mixes_positions(slot.seed, slot.point.dim):
            return
        try:
            given = {**inspect.signature(host.forward).bind_partial(*args).arguments, **kwargs}
        except TypeError:  # the host's forward says it better
            return
        if needs_every_position(slot) and any(_is_filled(given.get(name)) for name in _CACHES):
            raise HostError(
                f"{_who(slot)} would see the new tokens alone, because the cache holds those before them.\n"
                "Generate with model.generate(...), which leaves the cache out where it must, "
                "or pass use_cache=False."
            )
        if any(_hides(given.get(name), slot.point.causal) for name in _MASKS):
            side = " before a token" if slot.point.causal else ""
            raise HostError(
                f"{_who(slot)} would look at padding{side}: a slot hands its seed no attention mask.\n"
                f"{'Pad on the right' if slot.point.causal else 'Use batches of one length'}, or germinate a seed that "
                "treats each position by itself, such as 'transformer:mlp', 'transformer:lora' or 'transformer:norm'."
            )


def needs_every_position(slot: SeedSlot) -> bool:
    """Return whether a slot's output at a position depends on features of others."""
    if (
        slot.mode in HOST_FEATURES_MODES
        or slot.seed is None
        or slot.point.topology is not Topology.TRANSFORMER
    ):
        return False
    return bool(mixes_positions(slot.seed, slot.point.dim))


def attach_guard(host: nn.Module, slot: SeedSlot) -> torch.utils.hooks.RemovableHandle | None:
    """Guard a slot of a host; ``None`` if its features have no positions in a sequence."""
    if slot.point.topology is not Topology.TRANSFORMER:
        return None
    return host.register_forward_pre_hook(PositionGuard(slot), with_kwargs=True)


def _who(slot: SeedSlot) -> str:
    blueprint = slot.state.blueprint_id if slot.state is not None else "?"
    return f"Seed '{blueprint}' in slot '{slot.name}' mixes positions and"


def _is_filled(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    return cache is not None and (length is None or int(length()) > 0)


def _hides(mask: Any, causal: bool) -> bool:
    """Return whether a mask hides positions that a seed would see; a mask of another form than ``(b, t)`` may."""
    if mask is None:
        return False
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return True
    seen = mask != 0
    hidden = ~seen[:, :-1] & seen[:, 1:] if causal else ~seen
    return bool(hidden.any())
