"""The mathematics of diffusion as pure functions over arrays."""
