"""A transformers model with slots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, cast, final

from kasmina_core import (
    BlueprintRegistry,
    ContextReader,
    ForwardMode,
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
from kasmina_hf.positions import TransformersCall
from kasmina_hf.structure import places, points


@final
class GrowingModel(MorphogeneticModel):
    """A `MorphogeneticModel` whose host is a transformers model; made by `grow`.

    Seeds that mix positions are told by `TransformersCall` what padding, packed documents and the cache mean. Everything
    else is as in its base.

    Args:
        host: The model.
        context: As for `MorphogeneticModel`; ``None`` for `TransformersCall`.
        options: Its other options.
    """

    def __init__(
        self, host: PreTrainedModel, *args: Any, context: ContextReader | None = None, **options: Any
    ) -> None:
        super().__init__(host, *args, context=context or TransformersCall(), **options)
        for slot in self.slots.values():
            _put_first(host.get_submodule(slot.point.path.partition(":")[0]), slot)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the host does, with the same arguments.

        Seeds that mix positions keep what they need of earlier tokens beside the host's cache. Where the cache is
        reordered, of a fixed size or of states, by beam search, ``cache_implementation`` or a host like Mamba, it is left
        out if there is such a seed, unless ``use_cache=True`` is given: slower, and the same tokens.

        Raises:
            HostError: If the host does not generate, or changes a cache in a way that such a seed cannot follow, as
                assisted decoding and ``prompt_lookup_num_tokens`` do.
        """
        host = cast("Any", self.host)
        if not host.can_generate():
            raise HostError(f"{type(host).__name__} does not generate: it has no language modelling head.")
        settings = kwargs.get("generation_config") or host.generation_config
        beams = kwargs.get("num_beams", getattr(settings, "num_beams", 1)) or 1
        kind = kwargs.get("cache_implementation", getattr(settings, "cache_implementation", None))
        mixing = [s.name for s in self.slots.values() if s.takes_context and s.mode != ForwardMode.PASS]
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if mixing and (kwargs.get(name) or getattr(settings, name, None)):
                raise HostError(
                    f"'{name}' crops the cache after each guess, which the seed that mixes positions in slot "
                    f"'{mixing[0]}' cannot follow.\n"
                    f"Generate without {name}: slower, and greedy decoding gives the same tokens."
                )
        if mixing and (beams > 1 or kind or getattr(host, "_is_stateful", False)):
            kwargs.setdefault("use_cache", False)
        return host.generate(*args, **kwargs)


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
    context: ContextReader | None = None,
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
        context: Reads what positions mean off each call, for seeds that mix them; ``None`` for ``TransformersCall()``.

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
        context=context,
    )


def _put_first(module: nn.Module, slot: SeedSlot) -> None:
    """Run a slot's hook before a module's others: those with which transformers records hidden states see its output."""
    hooks = cast("OrderedDict[int, Any]", module._forward_hooks)
    hooks.move_to_end(
        next(key for key, hook in hooks.items() if getattr(hook, "slot", None) is slot), last=False
    )
