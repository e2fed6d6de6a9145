"""Replays recordings of the PyTorch reference ("goldens") through this package and compares every array."""
