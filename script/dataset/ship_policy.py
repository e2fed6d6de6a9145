"""Reduce a pre-training checkpoint to the weights to act with, as they ship in data/.

    python script/dataset/ship_policy.py log/gym-pretrain/<name>/<date>_<seed>/checkpoint/state_40.safetensors \\
        data/gym/hopper-medium-v2/pre_diffusion_mlp.safetensors
"""

import argparse
import sys

import numpy as np

from diffusion_rl.cli.status import exit_status
from diffusion_rl.config.overrides import Arguments


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="state_<n>.safetensors of a pre-training run")
    parser.add_argument("output", help="file to write")
    parser.add_argument("--bits", type=int, default=32, choices=(32, 16, 8), help="fewer for large networks")
    arguments = parser.parse_args()
    from diffusion_rl.training.checkpoint import in_eight_bits, load_checkpoint, require_kind, save_checkpoint
    from diffusion_rl.training.policy_files import ACTS_WITH_LAST, PRETRAINED, policy_weights

    checkpoint = load_checkpoint(arguments.checkpoint)
    require_kind(checkpoint, PRETRAINED, arguments.checkpoint)
    group = "model" if checkpoint.metadata["kind"] in ACTS_WITH_LAST else "ema"
    tensors = {f"{group}.{name}": value for name, value in policy_weights(checkpoint).items()}
    size = sum(tensor.size for tensor in tensors.values())
    if arguments.bits == 16:
        tensors = {name: value.astype(np.float16) for name, value in tensors.items()}
    elif arguments.bits == 8:
        tensors = in_eight_bits(tensors)
    metadata = {key: value for key, value in checkpoint.metadata.items() if key != "train"}
    here = ("log_dir", "logdir", "resume")  # folders of the machine that it was trained on
    metadata["config"] = {k: v for k, v in (metadata.get("config") or {}).items() if k not in here}
    save_checkpoint(arguments.output, tensors, metadata)
    print(f"{arguments.output}: {size} parameters")


if __name__ == "__main__":
    sys.exit(exit_status(main))
