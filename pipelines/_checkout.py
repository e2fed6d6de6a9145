"""Importing this makes the package of a checkout that is not installed importable."""

import sys
from pathlib import Path

CODE = str(Path(__file__).resolve().parent.parent / "code")
if CODE not in sys.path:
    sys.path.append(CODE)
