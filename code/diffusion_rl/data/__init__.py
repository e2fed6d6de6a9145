"""Data sets: sources, sequences, replay, shipped and downloadable assets."""
