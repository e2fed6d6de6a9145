"""Makers of the home-made data that ship with the repository."""
