#!/bin/sh
# Downloads azcopy, to bin/azcopy.
set -eu
cd "$(dirname "$0")/.."
mkdir -p bin
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
curl --fail --location --silent --show-error --output "$archive" "${AZCOPY_URL:-https://aka.ms/downloadazcopy-v10-linux}"
tar --extract --gzip --file "$archive" --directory bin --strip-components=1 --no-same-owner --wildcards '*/azcopy'
echo "bin/azcopy"
