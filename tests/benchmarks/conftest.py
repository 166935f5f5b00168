"""Benchmarks are no part of what is installed: they are imported from the checkout."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])

if ROOT not in sys.path:
    sys.path.append(ROOT)
