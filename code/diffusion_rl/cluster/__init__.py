"""Simulators on many machines, on Ray."""
