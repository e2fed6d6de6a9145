"""Diffuser, action-only Diffuser and Kuka stacking: diffusion models of trajectories, and plans made with them."""
