"""Command lines of flags (argparse) whose mistakes are one line, like all others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from diffusion_rl.core.errors import UserError


class Arguments(argparse.ArgumentParser):
    """A parser that raises UserError, takes no abbreviations, and every option with a value only once."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message} (--help says what there is)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments as attributes, and what is left; a command of several (a subparser) does so with its own."""
        self.given = set[str]()
        return super().parse_known_args(args, namespace)


class _Once(argparse.Action):
    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: str | Sequence[Any] | None, option: str | None = None
    ) -> None:
        if self.dest in parser.given:
            parser.error(f"{option or self.dest} stands twice: give it once")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)
