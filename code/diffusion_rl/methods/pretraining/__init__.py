"""Behaviour cloning of diffusion, Gaussian and mixture policies."""
