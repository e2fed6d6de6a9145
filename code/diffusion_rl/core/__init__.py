"""Numerical foundations: noise, optimizers, schedules, normalizers, returns. No files, no environments."""
