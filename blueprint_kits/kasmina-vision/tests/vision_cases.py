"""The pack's seeds, and features to feed them, for the tests in this folder."""

from __future__ import annotations

from functools import partial

import kasmina_vision
import pytest

from kasmina_core import BlueprintSpec
from kasmina_core.testing import seeds

SPECS: dict[str, BlueprintSpec] = {spec.name: spec for spec in kasmina_vision.kasmina_blueprints()}
every_blueprint = pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
features = partial(seeds.features, SPECS["cbam"])
"""Random features ``(batch, dim, *size)``."""
