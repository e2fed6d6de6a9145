"""Write a checkpoint's policy as a SavedModel or a TFLite model that needs nothing but TensorFlow.

    python script/export_policy.py log/…/checkpoint/state_999.safetensors --format tflite

A checkpoint of the reference (.pt) does not hold its configuration: name one, with any overrides after it.

    python script/export_policy.py state_999.pt --format savedmodel \\
        --config gym/eval/hopper-v2/eval_diffusion_mlp ft_denoising_steps=10
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from diffusion_rl.cli.status import exit_status  # noqa: E402
from diffusion_rl.config.compose import compose_job, prepare  # noqa: E402
from diffusion_rl.config.instantiate import plain  # noqa: E402
from diffusion_rl.config.overrides import Arguments  # noqa: E402
from diffusion_rl.core.errors import UserError  # noqa: E402
from diffusion_rl.core.places import here_or_shipped  # noqa: E402


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--format", required=True, choices=("savedmodel", "tflite"))
    parser.add_argument("--output", type=Path, help="the folder or file to write; default: beside the checkpoint")
    parser.add_argument("--force", action="store_true", help="replace an export that is there")
    parser.add_argument("--config", help="name of a configuration under cfg/, for a checkpoint that holds none")
    parser.add_argument("--allow", action="append", default=[], help="your own network's class (my_module.Net)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to --config")
    args = parser.parse_intermixed_args()
    checkpoint = here_or_shipped(args.checkpoint)
    config = configuration(args.config, args.overrides, checkpoint)
    from diffusion_rl.export.saved import export_policy

    print(export_policy(checkpoint, args.format, args.output, config, args.force, args.allow).report())


def configuration(name: str | None, overrides: list[str], checkpoint: Path) -> dict[str, Any] | None:
    if name is None:
        if overrides:
            raise UserError(f"{overrides[0]} changes a configuration: name it with --config")
        return None
    return plain(prepare(compose_job(name, [*overrides, f"++base_policy_path={checkpoint}"])))


if __name__ == "__main__":
    sys.exit(exit_status(main))
