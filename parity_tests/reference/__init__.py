"""Compact PyTorch twins of this package's mathematics, written from the papers, to compare against on drawn inputs.

The twins are functional: weights are a dictionary of tensors under the state_dict names, and every draw is an argument.
They are themselves held to the recordings of the original PyTorch code (test_twins.py).
"""
