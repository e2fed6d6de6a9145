"""Helpers, under the names that robomimic gives them."""
