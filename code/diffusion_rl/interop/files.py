"""The name under which `core.files` was known."""

from diffusion_rl.core.files import atomic_file as atomic_file
