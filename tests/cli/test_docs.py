"""Every command has a page, and every `rmu` line of the documentation is one that the command understands."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from rmu.cli import COMMANDS, main
from rmu.settings import preset_names

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Parsed(BaseException):
    """The line has been understood; what it asks for is not done."""


def lines():
    for page in PAGES:
        for language, block in re.findall(
            r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
        ):
            if language not in ("", "bash", "console", "sh") or not block.startswith(("rmu ", "$ rmu ", "#")):
                continue  # what a command prints
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                if line.startswith(("rmu ", "$ rmu ")) and "..." not in line:
                    yield pytest.param(line.removeprefix("$ "), id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("line", list(lines()))
def test_every_line_is_understood(line, monkeypatch, capsys):
    _, command, *argv = shlex.split(line, comments=True)
    argv = argv[: argv.index("|")] if "|" in argv else argv
    parse = argparse.ArgumentParser.parse_known_args

    def parse_only(self, *args, **kwargs):
        result = parse(self, *args, **kwargs)
        if self.prog.startswith(f"rmu {command}"):
            assert command == "demo" or not result[1], f"not understood: {result[1]}"
            raise Parsed
        return result

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    with pytest.raises(Parsed):
        main([command, *argv])
        pytest.fail(capsys.readouterr().err)


def test_every_command_and_preset_is_documented():
    text = "\n".join(page.read_text() for page in PAGES)
    commands = {param.values[0].split()[1] for param in lines()}
    assert set(COMMANDS) <= commands, set(COMMANDS) - commands
    assert not [name for name in preset_names() if f"`{name}`" not in text]
