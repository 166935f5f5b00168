"""Parts that the bundled packs share: layers, seeds and hosts for several layouts, sizes. Offers nothing by itself.

PYTEST_DONT_REWRITE: see `kasmina_core`.
"""
