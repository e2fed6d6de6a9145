"""What configurations may say: which keys a run reads, and the ranges of their values."""
