"""Measurements of what the library costs, as ratios taken in one run; each module is run with ``python -m``."""
