"""Pre-train, fine-tune or evaluate: python script/run.py --config-name=NAME --config-dir=DIR [key=value ...]."""

import sys
from pathlib import Path

try:
    from diffusion_rl.cli import app
except ModuleNotFoundError as error:
    if error.name != "diffusion_rl":
        raise
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))  # a checkout that is not installed
    from diffusion_rl.cli import app

if __name__ == "__main__":
    sys.exit(app.main())
