"""The facts of each task that are known before anything runs: numbers, goals and rewards."""
