"""Blueprints: declarations, names, and building a seed."""
