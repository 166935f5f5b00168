"""A transformers model with slots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, cast, final

from kasmina_core import (
    BlueprintRegistry,
    GrowthConfig,
    HostError,
    InjectionPoint,
    MorphogeneticModel,
    SeedSlot,
    Telemetry,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from kasmina_hf.inputs import example_inputs
from kasmina_hf.positions import attach_guard, needs_every_position
from kasmina_hf.structure import places, points


@final
class GrowingModel(MorphogeneticModel):
    """A `MorphogeneticModel` whose host is a transformers model; made by `grow`.

    It refuses input that a seed which mixes positions could not treat rightly, a filled cache or padding that the
    seed would look at, and generates without the cache where a seed needs that. Everything else is as in its base.

    Args:
        host: The model.
        options: Those of `MorphogeneticModel`.
    """

    def __init__(self, host: PreTrainedModel, *args: Any, **options: Any) -> None:
        super().__init__(host, *args, **options)
        for slot in self.slots.values():
            _put_first(host.get_submodule(slot.point.path.partition(":")[0]), slot)
        self._guards = [attach_guard(host, slot) for slot in self.slots.values()]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the host does, with the same arguments; without the cache if a seed mixes positions.

        Generating without the cache computes every position anew for each token: slower, and the only way to give
        such a seed what it was trained on.

        Raises:
            HostError: If the host does not generate, or a seed that mixes positions would see a cache that was asked
                for, or padding.
        """
        host = cast("Any", self.host)
        if not host.can_generate():
            raise HostError(f"{type(host).__name__} does not generate: it has no language modelling head.")
        if any(needs_every_position(slot) for slot in self.slots.values()):
            kwargs.setdefault("use_cache", False)
        return host.generate(*args, **kwargs)

    def detach_slots(self) -> nn.Module:
        """Take the slots off the host and return it as it was; seeds stay behind with this model."""
        for guard in self._guards:
            if guard is not None:
                guard.remove()
        self._guards = []
        return super().detach_slots()


def grow(
    model: PreTrainedModel,
    slots: str | InjectionPoint | Iterable[str | InjectionPoint] | None = None,
    *,
    every: int = 1,
    example: object = None,
    config: GrowthConfig | None = None,
    registry: BlueprintRegistry | None = None,
    telemetry: Telemetry | None = None,
    evaluator: Callable[[], Tensor] | None = None,
) -> GrowingModel:
    """Give a transformers model slots in which seeds can grow.

    The model stays what it is, with its class, keys and methods; the slots hang on the outputs of its layers.

    Args:
        model: Any transformers model, such as one of ``AutoModelForCausalLM.from_pretrained``.
        slots: Where: names of its `points`, paths of modules, globs such as ``"model.layers.*"`` or `InjectionPoint` declarations; ``None``
            for the model's `points`.
        every: Distance between points where ``slots`` is ``None``: 2 takes every second layer.
        example: Inputs for one forward, a tensor, a tuple or a mapping of keywords, which proves that the slots work;
            ``None`` for `example_inputs`.
        config: How seeds are treated.
        registry: Where blueprints come from; ``None`` for the installed packs.
        telemetry: Takes the events.
        evaluator: Returns the loss of every held-out sample, ``(n,)``, for the gates.

    Raises:
        HostError: If points or inputs cannot be derived, or a point cannot hold a slot; the model is left as it was.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> grow(GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=1, bos_token_id=0, eos_token_id=0)))
    GrowingModel(...)
    """
    if not isinstance(model, PreTrainedModel):
        raise HostError(
            f"{type(model).__name__} is not a transformers model. kasmina_core.MorphogeneticModel takes any module: "
            "name its points there."
        )
    example = example_inputs(model) if example is None else example
    named = [slots] if isinstance(slots, (str, InjectionPoint)) else slots
    return GrowingModel(
        model,
        points(model, every, example) if named is None else places(model, named, example),
        example=example,
        config=config,
        registry=registry,
        telemetry=telemetry,
        evaluator=evaluator,
    )


def _put_first(module: nn.Module, slot: SeedSlot) -> None:
    """Run a slot's hook before a module's others: those with which transformers records hidden states see its output."""
    hooks = cast("OrderedDict[int, Any]", module._forward_hooks)
    hooks.move_to_end(
        next(key for key, hook in hooks.items() if getattr(hook, "slot", None) is slot), last=False
    )
