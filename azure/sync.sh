#!/bin/sh
# Fetches the runs in the storage container to logs/. `./azure/sync.sh up` sends those here to the container.
set -eu
cd "$(dirname "$0")/.."
settings=$("${PYTHON:-python}" azure/config.py AZURE_STORAGE_ACCOUNT)
eval "$settings"
if [ ! -x bin/azcopy ]; then
    echo "there is no bin/azcopy: ./azure/download.sh" >&2
    exit 2
fi
if [ -n "$AZURE_CLIENT_ID" ]; then # else those of azcopy login
    export AZCOPY_AUTO_LOGIN_TYPE=SPN AZCOPY_TENANT_ID="$AZURE_TENANT_ID"
    export AZCOPY_SPA_APPLICATION_ID="$AZURE_CLIENT_ID" AZCOPY_SPA_CLIENT_SECRET="$AZURE_CLIENT_SECRET"
fi
remote=https://$AZURE_STORAGE_ACCOUNT.blob.core.windows.net/$AZURE_STORAGE_CONTAINER/logs
mkdir -p logs
case ${1:-down} in
    down) bin/azcopy sync "$remote" logs --recursive ;;
    up) bin/azcopy sync logs "$remote" --recursive ;;
    *) echo "usage: ./azure/sync.sh [up]" >&2 && exit 2 ;;
esac
