"""Callbacks for other people's trainers; each module needs an extra and is imported by name."""
