"""The part of robomimic that DPPO needs, without PyTorch: see ../README.md."""

__version__ = "0.3.0"  # the version whose names, arguments and results these are
