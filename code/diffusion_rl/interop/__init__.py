"""The only place that knows PyTorch."""
