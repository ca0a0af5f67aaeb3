"""``python -m bench``: every measurement, and the tables of the docs."""

from __future__ import annotations

import typer

from bench.checkpoints.commands import app as checkpoints
from bench.forgetting.commands import app as forgetting
from bench.fuzzing.commands import app as fuzzing
from bench.kernels.commands import app as kernels
from bench.training.commands import app as training
from rkif.cli.errors import exit_in_one_line

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for part in (kernels, training, forgetting, checkpoints, fuzzing):
    app.add_typer(part)


@app.command("docs")
def docs_command() -> None:
    """Write the generated parts of README.md and the docs: tables of results, API reference, notebook."""
    from bench.docs import generated

    for file, text in generated():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    exit_in_one_line(app)
