"""VAE + Diffusion RL: a diffusion policy over latent chunks of one or several agents."""
