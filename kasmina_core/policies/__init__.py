"""Bundled policies: when to germinate, what, and what to keep."""
