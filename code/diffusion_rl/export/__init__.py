"""Policies that run without this package's training code: SavedModel and TFLite."""
