"""Keras modules that own weights."""
