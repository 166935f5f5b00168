"""Growth in several processes."""
