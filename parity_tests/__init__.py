"""The fidelity ladder: this package against the PyTorch reference, rung by rung (see ARCHITECTURE.md)."""
