"""A host for Kasmina: a network with places where seeds can grow.

This module is the package's entry point. It imports no torch: the host is named as text and imported when it is first
used, so that listing the installed packs stays quick.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kasmina_core import HostSpec, Topology, hookimpl

if TYPE_CHECKING:
    from kasmina_template_host.host import TemplateHost as TemplateHost

__all__ = ["TemplateHost", "kasmina_hosts"]


@hookimpl
def kasmina_hosts() -> Iterable[HostSpec]:
    """Return the host."""
    return [
        HostSpec(
            "net",
            "kasmina_template_host.host:TemplateHost",
            Topology.CNN,
            "Small residual classifier of images; a slot after every block",
        )
    ]


# No __dir__: pluggy before 1.7 reads every name that dir() lists, and reading TemplateHost imports torch.
def __getattr__(name: str) -> Any:
    if name == "TemplateHost":
        from kasmina_template_host.host import TemplateHost

        return TemplateHost
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
