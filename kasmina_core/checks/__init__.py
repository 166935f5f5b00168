"""Checks of blueprints at registration, and reports."""
