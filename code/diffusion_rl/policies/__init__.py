"""From observation to action, log-probability and value."""
