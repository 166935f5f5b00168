"""Measurements of what a seed is worth."""
