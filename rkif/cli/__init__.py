"""The command line: one module for each group of commands.

Everything except typer is imported inside the commands' functions, so that help texts and the first line of
every command appear before PyTorch is imported.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rkif.cli import checkpoint, continual, ledger, plan, signatures
from rkif.cli.errors import DEBUG, USAGE, exit_in_one_line

PANELS = ("Start", "Learn", "Inspect", "Fuse", "Sign and verify")


class CommandGroups(TyperGroup):
    """Lists the commands in groups. The help is plain text, which does not cut long names at any width."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for panel in PANELS:
            every: list[Any] = list(self.commands.values())
            commands = [one for one in every if one.rich_help_panel == panel]
            with formatter.section(panel):
                formatter.write_dl([(one.name, one.get_short_help_str(limit=200)) for one in commands])


app = typer.Typer(
    cls=CommandGroups,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for group in (continual, ledger, checkpoint, signatures, plan):
    app.add_typer(group.commands)


def _version(wanted: bool) -> None:
    if wanted:
        import rkif

        print(f"rkif {rkif.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show the traceback of an error; also after the command.")
    ] = False,
) -> None:
    """Recurrent Knowledge Identification and Fusion: learning task after task with less forgetting.

    \b
    First steps:
      rkif demo                                   compare three methods on small tasks
      rkif run CONFIG.yaml --out RUN              train on a sequence of tasks
      rkif fuse BASE INNER OUTER --out DIR        fuse checkpoints on disk
    """
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(USAGE)


def main() -> None:
    """Run the command line of this process."""
    exit_in_one_line(app)
