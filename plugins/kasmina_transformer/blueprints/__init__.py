"""The seeds of the pack, one file per family. Each returns exactly its input until it has learned something."""
