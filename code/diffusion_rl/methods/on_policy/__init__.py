"""DPPO and its kin: PPO on denoising chains, Gaussians and mixtures."""
