"""Convert a checkpoint of the PyTorch reference (.pt) into one of ours (.safetensors), or back, bit for bit.

    python script/convert_checkpoint.py state_3000.pt state_3000.safetensors

The direction follows from the suffixes. PyTorch is not needed, and nothing in a .pt file is executed.
"""

import argparse
import collections
import os
import sys
from pathlib import Path

from diffusion_rl.cli.status import exit_status
from diffusion_rl.config.overrides import Arguments
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.places import here_or_shipped
from diffusion_rl.interop.description import describe_networks, infer_kind
from diffusion_rl.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path, help="a .pt or .safetensors checkpoint")
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write, of the other suffix")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    arguments = parser.parse_args()
    if {arguments.source.suffix, arguments.target.suffix} != {".pt", ".safetensors"}:
        raise UserError("of IN and OUT, one must end in .pt and the other in .safetensors")
    if os.path.lexists(arguments.target) and not arguments.force:
        raise UserError(f"{arguments.target} exists: choose another name, or add --force to overwrite it")
    checkpoint = load_checkpoint(here_or_shipped(arguments.source))
    if infer_kind(checkpoint.tensors) == "unknown" and checkpoint.metadata.get("kind", "unknown") == "unknown":
        parts = ", ".join(sorted({name.partition(".")[0] for name in checkpoint.select("model.")})[:8]) or "none"
        raise UserError(f"{arguments.source} is of no method that this package knows (parts of its model: {parts})")
    save_checkpoint(arguments.target, checkpoint.tensors, checkpoint.metadata)
    describe(checkpoint, arguments.target)


def describe(checkpoint: Checkpoint, target: Path) -> None:
    """Print the kind of the checkpoint, and the network, tensors and parameters of each part."""
    metadata, networks = checkpoint.metadata, describe_networks(checkpoint.tensors)
    print(f"kind: {metadata.get('kind', 'unknown')}")
    print(*(f"{counter}: {metadata[counter]}" for counter in ("epoch", "itr") if counter in metadata), sep="\n")
    parts = collections.defaultdict(list)
    for name, tensor in checkpoint.tensors.items():
        parts[".".join(name.split(".")[:2])].append(tensor.size)
    for part, sizes in parts.items():
        group, _, name = part.partition(".")
        left_out = target.suffix == ".pt" and group not in ("model", "ema")
        note = "(left out: a .pt file of the reference has no place for it)" if left_out else ""
        facts = networks.get(name, {}) if group in ("model", "ema") else {}
        note = note or ", ".join(str(v) if k == "class" else f"{k}={v}" for k, v in facts.items())
        print(f"  {part:<24} {len(sizes):>4} tensors {sum(sizes):>12,} parameters  {note}".rstrip())
    print(f"wrote {target}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
