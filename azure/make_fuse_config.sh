#!/bin/sh
# Writes azure/fuse.yaml, with which azure/mount.sh mounts the storage container (blobfuse2). It holds the account's key.
set -eu
cd "$(dirname "$0")"
settings=$("${PYTHON:-python}" config.py AZURE_STORAGE_KEY)
eval "$settings"
umask 077
cat >fuse.yaml <<CONFIG
components: [libfuse, file_cache, attr_cache, azstorage]
file_cache:
  path: ${TMPDIR:-/tmp}/azure_mount_cache
azstorage:
  type: block
  account-name: $AZURE_STORAGE_ACCOUNT
  account-key: $AZURE_STORAGE_KEY
  mode: key
  container: $AZURE_STORAGE_CONTAINER
CONFIG
echo "azure/fuse.yaml"
