"""The seeds of the pack, one file a family. Each returns exactly its input until it has learned something."""
