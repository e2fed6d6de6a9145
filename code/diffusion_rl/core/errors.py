"""Errors meant for people."""


class UserError(Exception):
    """Something the user can mend: one line that names the thing and the cure.

    The command lines print it without a traceback and exit with status 2 (with a traceback under `HYDRA_FULL_ERROR=1`).
    """


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived and the state of the run has been saved; `str()` says where."""
