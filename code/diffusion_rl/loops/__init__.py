"""On-policy, off-policy and offline training loops, evaluation and the state of a run."""
