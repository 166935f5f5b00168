"""The bundled policies by name, for commands and configuration files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from kasmina_core.errors import KasminaError, did_you_mean
from kasmina_core.policies.bandit import BanditPolicy
from kasmina_core.policies.budget import BudgetPolicy, blueprint_costs
from kasmina_core.policies.growing import Candidates
from kasmina_core.policies.plateau import FixedTimesPolicy, PlateauPolicy
from kasmina_core.policies.tournament import TournamentPolicy
from kasmina_core.policy import NoGrowthPolicy, Policy

if TYPE_CHECKING:
    from kasmina_core.blueprints import BlueprintRegistry

BUNDLED: Final[Mapping[str, Callable[..., Policy]]] = MappingProxyType(
    {
        "plateau": PlateauPolicy,
        "fixed-times": FixedTimesPolicy,
        "budget": BudgetPolicy,
        "bandit": BanditPolicy,
        "tournament": TournamentPolicy,
        "none": NoGrowthPolicy,
    }
)
"""Policy classes by name; all but ``none`` take ``blueprints`` and keywords."""


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
) -> Policy:
    """Build a policy from its name's factory, candidates and options.

    Args:
        name: Its name, for errors.
        factory: Makes it, such as one of `BUNDLED` or of a pack.
        blueprints: Candidates.
        options: Keywords: plain data.
        registry: What a budget counts costs with.
        seed: What a bandit draws with.

    Raises:
        PolicyOptionError: If it does not take an option, or refuses its value.
    """
    if factory is NoGrowthPolicy:
        given: dict[str, Any] = dict(options)
    else:
        given = {"blueprints": blueprints, **options}
    if factory is BudgetPolicy and registry is not None:
        given.setdefault("costs", blueprint_costs(registry, count_operations="flops" in options))
    if factory is BanditPolicy:
        given.setdefault("seed", seed)
    known = [parameter for parameter in inspect.signature(factory).parameters if parameter != "blueprints"]
    try:
        inspect.signature(factory).bind(**given)
    except TypeError as error:
        odd = next((option for option in options if option not in known), "")
        raise PolicyOptionError(
            f"Policy '{name}' does not take these options: {error}.{did_you_mean(odd, known)}\n"
            f"  options: {', '.join(known) or 'none'}"
        ) from error
    try:
        return factory(**given)
    except (TypeError, ValueError) as error:
        raise PolicyOptionError(f"Policy '{name}' refuses its options: {error}") from error
