"""The bundled policies by name, for commands and configuration files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from kasmina_core.errors import KasminaError, did_you_mean
from kasmina_core.policies.bandit import BanditPolicy
from kasmina_core.policies.budget import BudgetPolicy, blueprint_costs
from kasmina_core.policies.growing import Candidates
from kasmina_core.policies.plan import PlanPolicy, blueprint_sizes
from kasmina_core.policies.plateau import FixedTimesPolicy, PlateauPolicy
from kasmina_core.policies.protocol import NoGrowthPolicy, Policy
from kasmina_core.policies.tournament import TournamentPolicy

if TYPE_CHECKING:
    from kasmina_core.blueprints.catalogue import BlueprintRegistry

BUNDLED: Final[Mapping[str, Callable[..., Policy]]] = MappingProxyType(
    {
        "plateau": PlateauPolicy,
        "fixed-times": FixedTimesPolicy,
        "budget": BudgetPolicy,
        "plan": PlanPolicy,
        "bandit": BanditPolicy,
        "tournament": TournamentPolicy,
        "none": NoGrowthPolicy,
    }
)
"""Policy classes by name; all but ``none`` take ``blueprints`` and keywords."""


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


_KINDS: Final[Mapping[str, tuple[str, Callable[[Any], bool]]]] = MappingProxyType(
    {
        "int": ("a whole number", lambda value: _is_a(Integral, value)),
        "float": ("a number", lambda value: _is_a(Real, value)),
        "bool": ("true or false", lambda value: isinstance(value, bool)),
        "Sequence[int]": (
            "a list of whole numbers, such as [3,8]",
            lambda value: isinstance(value, (list, tuple)) and all(_is_a(Integral, one) for one in value),
        ),
        "Sequence[float]": (
            "a list of numbers, such as [0.1,0.4]",
            lambda value: isinstance(value, (list, tuple)) and all(_is_a(Real, one) for one in value),
        ),
        "Mapping[str, Any]": (
            'a mapping, such as {"copies":2}',
            lambda value: isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
        ),
        "str": ("text", lambda value: isinstance(value, str)),
    }
)
"""What annotations of options ask for, and whether a value is it; other annotations are the policy's own affair."""


class PolicyOptionError(KasminaError):
    """A policy does not take the options it was given."""


def build_policy(
    name: str,
    factory: Callable[..., Policy],
    blueprints: Candidates,
    options: Mapping[str, Any],
    *,
    registry: BlueprintRegistry | None = None,
    seed: int = 0,
    epochs: int | None = None,
) -> Policy:
    """Build a policy from its name's factory, candidates and options.

    Args:
        name: Its name, for errors.
        factory: Makes it, such as one of `BUNDLED` or of a pack.
        blueprints: Candidates.
        options: Keywords: plain data.
        registry: What a budget counts costs with.
        seed: What a bandit draws with.
        epochs: Epochs of the run, if they are known: a plan's shares are of them. Without options a plan has two waves,
            at .1 and .4 of them.

    Raises:
        PolicyOptionError: If it does not take an option, or refuses its value.
    """
    if factory is NoGrowthPolicy:
        given: dict[str, Any] = dict(options)
    else:
        given = {"blueprints": blueprints, **options}
    if factory is BudgetPolicy and registry is not None:
        given.setdefault("costs", blueprint_costs(registry, count_operations="flops" in options))
    if factory is PlanPolicy:
        if registry is not None:
            given.setdefault("sizes", blueprint_sizes(registry))
        if not given.keys() & {"at", "shares", "needs"}:
            given["shares"] = [0.1, 0.4]
        if given.get("unit", "epochs") == "epochs" and epochs is not None:
            given.setdefault("budget", epochs)
    if factory is BanditPolicy:
        given.setdefault("seed", seed)
    parameters = inspect.signature(factory).parameters
    known = [parameter for parameter in parameters if parameter != "blueprints"]
    try:
        inspect.signature(factory).bind(**given)
    except TypeError as error:
        odd = next((option for option in options if option not in known), "")
        meant = did_you_mean(odd, known) if odd else ""
        raise PolicyOptionError(
            f"Policy '{name}' does not take these options: {error}."
            f"{'' if meant.startswith(' Known:') else meant}\n"
            f"  options: {', '.join(known) or 'none'}"
        ) from error
    for option, value in options.items():
        if option in parameters:
            _demand_kind(name, option, value, parameters[option].annotation)
    try:
        return factory(**given)
    except (TypeError, ValueError) as error:
        raise PolicyOptionError(f"Policy '{name}' refuses its options: {error}") from error


def _demand_kind(policy: str, option: str, value: Any, annotation: Any) -> None:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    bare = text.removesuffix(" | None")
    wanted, fits = _KINDS.get(bare, ("", None))
    if fits is None or fits(value) or (value is None and bare != text):
        return
    raise PolicyOptionError(
        f"Policy '{policy}' refuses an option.\n"
        f"  given:  {option}={value if isinstance(value, str) else json.dumps(value, default=str)}\n"
        f"  wanted: {wanted}{', or null' if bare != text else ''}"
    )
