"""Pre-train, fine-tune or evaluate: python script/run.py --config-name=NAME --config-dir=DIR [key=value ...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))  # the package of this checkout

from diffusion_rl.cli import app  # noqa: E402

if __name__ == "__main__":
    sys.exit(app.main())
