#!/bin/sh
# Mounts the storage container at ~/azure_mount. To end it: sudo umount -f ~/azure_mount; rm -r ~/azure_mount
set -eu
cd "$(dirname "$0")"
if [ ! -f fuse.yaml ]; then
    echo "there is no azure/fuse.yaml: ./azure/make_fuse_config.sh" >&2
    exit 2
fi
mkdir -p "$HOME/azure_mount"
blobfuse2 mount "$HOME/azure_mount" --config-file=fuse.yaml
