"""The two layouts of features that a slot can hold."""

from __future__ import annotations

from enum import Enum
from typing import final

from kasmina_core.errors import TopologyError, did_you_mean


@final
class Topology(Enum):
    """Layout of the features at an injection point.

    - ``CNN``: ``(b, c, h, w)``, the width is ``c``.
    - ``TRANSFORMER``: ``(b, t, d)``, the width is ``d``.

    >>> Topology("cnn")
    <Topology.CNN: 'cnn'>
    """

    CNN = "cnn"
    TRANSFORMER = "transformer"

    @classmethod
    def _missing_(cls, value: object) -> Topology:
        names = [member.value for member in cls]
        if isinstance(value, str) and value.lower() in names:
            return cls(value.lower())
        raise TopologyError(
            f"{value!r} is not a topology.{did_you_mean(str(value), names)} Valid: {', '.join(names)}."
        )

    @property
    def feature_dim(self) -> int:
        """Index of the width in a feature tensor: 1 for ``(b, c, h, w)``, -1 for ``(b, t, d)``."""
        return 1 if self is Topology.CNN else -1

    @property
    def ndim(self) -> int:
        """Number of dimensions of a feature tensor: 4 or 3."""
        return 4 if self is Topology.CNN else 3
