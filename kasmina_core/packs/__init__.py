"""Packs: their hooks, and finding, loading and diagnosing them."""
