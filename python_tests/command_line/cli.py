"""Runs the command `dsmoe`: in this process, or, by MAIN, in one of its own."""

import sys

from typer.testing import CliRunner

from dsmoe_ext.command_line.app import app

MAIN = [sys.executable, "-c", "from dsmoe_ext.command_line.app import main; main()"]


def dsmoe(*arguments, **options):
    """The result has exit_code, stdout and stderr. options: as for CliRunner.invoke."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def run(*arguments) -> str:
    """Runs a command that must succeed; its standard output."""
    result = dsmoe(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments, code=1, **options) -> str:
    """Runs a command that must fail with one sentence, the last line on stderr; that line."""
    result = dsmoe(*arguments, **options)
    assert result.exit_code == code, result.output
    assert "unexpected" not in result.stderr and "Traceback" not in result.stderr, result.stderr
    lines = result.stderr.strip().splitlines()
    assert code == 2 or [line for line in lines if line.startswith("dsmoe: ")] == lines[-1:], lines
    return lines[-1]
