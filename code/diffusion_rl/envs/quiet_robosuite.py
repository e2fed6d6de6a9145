"""Imports robosuite without its warnings about a missing file of personal settings; workers share what it loads."""

import logging

logging.getLogger("robosuite_logs").addFilter(lambda record: "macro" not in record.getMessage())

import robosuite  # noqa: E402, F401
