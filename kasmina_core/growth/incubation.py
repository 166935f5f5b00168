"""The gradient of a loss for chosen parameters, and for nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor, nn

from kasmina_core.errors import HostError

_ADVICE: Final = (
    "A host with gradient checkpointing must use use_reentrant=False (transformers: "
    "gradient_checkpointing_enable({'use_reentrant': False})), or GrowthConfig(incubation='straight-through')."
)


def give_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Add a loss's gradient to the parameters' and to no other's.

    Raises:
        HostError: If the loss does not depend on anything that learns, or the host recomputes its features in a way that
            cannot give the gradient to chosen parameters.
    """
    if not loss.requires_grad:
        raise HostError(
            "The loss of a counterfactual pass depends on nothing that learns: the seed cannot learn from it.\n"
            f"Return the loss itself from the closure, without detach or no_grad. {_ADVICE}"
        )
    try:
        loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]  # torch
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise HostError(
            "Counterfactual incubation gives a gradient to the seed alone, and reentrant gradient checkpointing cannot "
            f"give one to chosen parameters.\n{_ADVICE}"
        ) from error
