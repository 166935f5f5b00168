"""Optimisers, schedulers, clipping and averages that follow growth."""
