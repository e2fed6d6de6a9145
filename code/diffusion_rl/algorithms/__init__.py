"""One readable file per algorithm: losses and updates, nothing about environments, files or logging."""
