"""Metrics, figures, tables, video."""
