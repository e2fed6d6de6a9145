"""A module for each command: options in, one call out."""
