"""The engine: run folders, checkpoints, signals, locks, rollouts and evaluation, the same for every method."""
