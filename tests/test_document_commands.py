"""The commands of the documents: each names files that are there; the slow ones run them."""

from __future__ import annotations

import os
import re
import shlex

import pytest
from tests import document_commands
from tests.document_commands import LIST, read

from diffusion_rl.config.compose import REPOSITORY

COMMANDS = [command for command in read() if not command.needs]
OWN = "exp_specs/my_vae_rl_config.yaml"  # a command before makes it
OVERRIDE = r"(\+\+|\+|~)?[A-Za-z_][\w.]*=.*"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.command)
def test_a_command_names_what_is_there(command):
    for part in command.command.split(" && "):
        words = shlex.split(part)
        if words[0].endswith(".sh"):
            assert os.access(REPOSITORY / words[0], os.X_OK)
        if words[0] != "python":
            continue
        assert (REPOSITORY / words[1]).is_file()
        options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--config-"))
        if options:
            assert (REPOSITORY / options["config-dir"] / f"{options['config-name']}.yaml").is_file()
            overrides = [*words[2:], *shlex.split(command.shorten)]
            assert all(re.fullmatch(OVERRIDE, word) for word in overrides if not word.startswith("--config-"))
        if "-e" in words:
            file = words[words.index("-e") + 1]
            assert file == OWN or (REPOSITORY / file).is_file()


def test_no_group_of_options_is_left_over():
    text = LIST.read_text()
    groups = re.findall(r"^  (\w+):", text.partition("commands:")[0], re.M)
    used = {name for line in re.findall(r"^  shorten: (.+)", text, re.M) for name in line.split()}
    assert set(groups) == used


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents")
    document_commands.prepare(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.command)
def test_a_command_does_what_its_document_says(command, folder):
    _, result = command.run(folder)
    assert result == "ok", command.shorten
