"""A reader of the calls of timm's vision transformers, for seeds that mix positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from kasmina_core import EveryPosition, HostError, SeedContext, call_arguments
from torch import nn


@final
class TimmCall:
    """Reads from a model's call which tokens are real.

    ``patch_valid`` ``(b, t)``, an argument of its own or in a mapping with the patches, says which patches are: those of
    NaFlexViT and Gemma 4. The class token and registers before them always are. ``is_causal`` is read too. All other
    models have neither, and all their positions are real.

    >>> valid = torch.tensor([[True, True, False]])
    >>> TimmCall()(nn.Identity(), ({"patches": torch.zeros(1, 3, 8), "patch_valid": valid},), {}).real
    tensor([[ True,  True, False]])
    """

    def __call__(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SeedContext:
        """Return the context of a call.

        Raises:
            HostError: If the call has an ``attn_mask``, or shows padding in another way.
        """
        given = call_arguments(host, args, kwargs)
        for value in [*given.values()]:
            if isinstance(value, Mapping):
                given |= value
        if given.get("attn_mask") is not None:
            raise HostError(
                "'attn_mask' says which tokens look at which, and a seed that mixes positions cannot follow it.\n"
                "Say which patches are padding by patch_valid, if the model takes it, or is_causal=True; or use a seed that "
                "treats each position by itself."
            )
        causal = bool(given.get("is_causal", False))
        valid = given.get("patch_valid")
        if valid is None:
            EveryPosition()(host, args, kwargs)
            return SeedContext(causal=causal)
        before = valid.new_ones(valid.shape[0], getattr(host, "num_prefix_tokens", 0), dtype=torch.bool)
        return SeedContext(real=torch.cat([before, valid.bool()], 1), causal=causal)

    def __repr__(self) -> str:
        return "TimmCall()"
