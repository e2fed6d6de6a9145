"""Planners: diffusion models of trajectories, and how to act by them."""
