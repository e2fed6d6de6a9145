#!/bin/sh
# The PyTorch Diffuser's published models, to logs/pretrained (about 1 GB; needs gdown).
set -eu
cd "$(dirname "$0")/.."
if ! command -v gdown >/dev/null; then
  echo "error: gdown is not installed: pip install gdown" >&2
  exit 2
fi
mkdir -p logs
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
gdown --output "$archive" "https://drive.google.com/uc?id=1wc1m4HLj7btaYDN8ogDIAV9QzgWEckGy"
tar -xf "$archive" --directory logs
echo "logs/pretrained: plan with python scripts/plan_guided.py --dataset NAME --logbase logs/pretrained"
