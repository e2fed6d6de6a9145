#!/bin/sh
# The PyTorch Diffuser's published models and plans, to logs/pretrained (about 1 GB): [folder instead of logs] [archive].
# Archives: pretrained.tar; pretrained_models.tar, the earlier one without plans. Needs pip install -e ".[download]".
set -eu
cd "$(dirname "$0")/.."
archive=$("${PYTHON:-python}" script/download.py "${2:-pretrained.tar}" --to "${1:-logs}")
tar --extract --file "$archive" --directory "${1:-logs}" --no-same-owner
rm "$archive" "$archive.sha256"
echo "${1:-logs}/pretrained: plan with python scripts/plan_guided.py --dataset NAME --logbase ${1:-logs}/pretrained"
