"""The slot: one seed at an injection point."""
