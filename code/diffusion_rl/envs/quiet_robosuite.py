"""Imports robosuite without its warnings about personal settings and optional packages that nothing here uses; workers
share what it loads."""

import logging

NEEDLESS = ("macro", "robosuite_models", "mink", "Loading controller")
logging.getLogger("robosuite_logs").addFilter(lambda record: not any(word in record.getMessage() for word in NEEDLESS))

import robosuite  # noqa: E402, F401
