"""Account, image and storage of the jobs on Azure: the environment variables of these names, or else what stands here.

python azure/config.py prints them for a shell: eval "$(python azure/config.py)". Names behind it must not be empty.
"""

import os
import shlex
import sys

DEFAULTS = {
    "DOCKER_USERNAME": "",  # to whose account the image was pushed
    "AZURE_SUBSCRIPTION_ID": "",  # empty: the one that az login chose
    "AZURE_RESOURCE_GROUP": "diffuser",
    "AZURE_REGION": "eastus2",
    "AZURE_STORAGE_CONTAINER": "diffuser",
    "AZURE_STORAGE_CONNECTION_STRING": "",  # Access keys of the storage account, Show keys, Connection string
    "AZURE_TENANT_ID": "",  # this and the next two: a service principal that may write to the container
    "AZURE_CLIENT_ID": "",
    "AZURE_CLIENT_SECRET": "",
}


def values() -> dict[str, str]:
    """Returns all of them, and AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY out of the connection string."""
    found = {name: os.environ.get(name) or default for name, default in DEFAULTS.items()}
    connection = found["AZURE_STORAGE_CONNECTION_STRING"] or os.environ.get("AZURE_STORAGE_CONNECTION", "")
    parts = dict(part.split("=", 1) for part in connection.split(";") if "=" in part)
    account = parts.get("AccountName") or os.environ.get("AZURE_STORAGE_ACCOUNT", "")
    return found | {"AZURE_STORAGE_ACCOUNT": account, "AZURE_STORAGE_KEY": parts.get("AccountKey", "")}


if __name__ == "__main__":
    if not all(values()[name] for name in sys.argv[1:]):
        print("set AZURE_STORAGE_CONNECTION_STRING, or fill it in in azure/config.py", file=sys.stderr)
        sys.exit(2)
    for name, value in values().items():
        print(f"export {name}={shlex.quote(value)}")
