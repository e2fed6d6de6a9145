"""Start a job on Azure for each combination in azure/launch_train.py. AZURE_DRY_RUN=1 prints the commands only."""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "code"))

import config  # noqa: E402
from launch_train import job, params_to_sweep  # noqa: E402

from diffusion_rl.cli import commands, launchers  # noqa: E402
from diffusion_rl.core.errors import UserError  # noqa: E402


def main(arguments: Sequence[str]) -> None:
    if arguments:
        raise UserError("azure/launch.py takes no options: change params_to_sweep in azure/launch_train.py")
    os.environ.update(config.values())
    dry_run = os.environ.get("AZURE_DRY_RUN", "") not in ("", "0")
    options = ((f"--{name}", ",".join(map(str, values))) for name, values in params_to_sweep.items())
    launchers.main(["azure", "--job", job, "--dry_run", str(dry_run), *itertools.chain(*options)])


if __name__ == "__main__":
    sys.exit(commands.run(main))
