"""`diffusion-rl COMMAND [option ...]`: the scripts by name. Each command is one line of its script's docstring."""

from __future__ import annotations

import ast
import re
import sys

from diffusion_rl.cli.status import USER_ERROR, show
from diffusion_rl.core.places import REPOSITORY
from diffusion_rl.core.programs import COMMAND, GROUPS, PROGRAMS


def main() -> int:
    """Runs the command line of this process. Returns its exit status; most commands end the process with theirs."""
    words = sys.argv[1:]
    group = words[0] if words and words[0] in GROUPS else ""
    length = 2 if group else 1
    name, rest = " ".join(words[:length]), words[length:]
    if name in PROGRAMS:
        _start(name, rest)
        return 0
    if len(words) < length or words[length - 1] in ("-h", "--help"):
        show(help_text(group))
        return 0
    from diffusion_rl.config.schema import did_you_mean

    known = f"{did_you_mean(name, PROGRAMS)} (--help lists them)"
    print(f"error: {COMMAND} has no command {name!r}{known}", file=sys.stderr)
    return USER_ERROR


def help_text(group: str = "") -> str:
    """Returns the list of commands, a line each, or of those of a group."""
    names = [name for name in PROGRAMS if name.rpartition(" ")[0] == group]
    rows = {name: _about(PROGRAMS[name]) for name in names} | ({} if group else GROUPS)
    width = max(map(len, rows))
    usage = f"usage: {COMMAND} {group and f'{group} '}COMMAND [option ...]   (--help after a command explains it)"
    return "\n".join([usage, "", *(f"  {name:<{width}}  {text}" for name, text in rows.items())])


def _about(script: str) -> str:
    """Returns what a script does: the first line of its docstring, up to how it is started."""
    docstring = ast.get_docstring(ast.parse((REPOSITORY / script).read_text(encoding="utf-8"))) or ""
    return re.split(r": (?:python\b|`)", docstring.partition("\n")[0])[0].rstrip(".")


def _start(name: str, arguments: list[str]) -> None:
    """Runs a script, which ends the process, as Python does but for its name; `runpy` would give it the file's."""
    path = REPOSITORY / PROGRAMS[name]
    sys.argv = [f"{COMMAND} {name}", *arguments]
    sys.path.insert(0, str(path.parent))
    exec(compile(path.read_bytes(), path, "exec"), {"__name__": "__main__", "__file__": str(path)})
