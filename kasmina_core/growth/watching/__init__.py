"""Warnings about misuse: calls that were forgotten, seeds nobody trains, graphs that torch.compile may refuse."""
