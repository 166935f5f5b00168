"""The seeds of the pack, one file each. Each returns exactly its input until it has learned something."""
