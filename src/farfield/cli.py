"""The program ``farfield``: its commands put together. Needs the extra ``cli``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

__all__ = ["build_app", "main"]


def build_app() -> typer.Typer:
    """Make the typer application. The commands import torch only when they run, so that help comes at once."""
    import typer

    from farfield.commands.bench import bench_command
    from farfield.commands.compare import compare_command
    from farfield.commands.convert import convert_command
    from farfield.commands.distill import distill_command
    from farfield.commands.doctor import doctor_command
    from farfield.commands.errors import plainly
    from farfield.commands.evaluate import eval_command
    from farfield.commands.generate import generate_command
    from farfield.commands.recipes import recipes_command
    from farfield.commands.show import show_command
    from farfield.commands.simulate import simulate_command
    from farfield.commands.sizes import sizes_command
    from farfield.commands.study import study_command
    from farfield.commands.train import train_command

    app = typer.Typer(
        name="farfield",
        help="Multiscale attention for PyTorch: which attention for your text, on your machine?",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def print_version(asked: bool) -> None:
        if asked:
            from farfield import __version__

            typer.echo(__version__)
            raise typer.Exit

    @app.callback()
    def options(
        version: bool = typer.Option(False, "--version", callback=print_version, is_eager=True, help="Print it."),
    ) -> None:
        pass

    for name, command in (
        ("compare", compare_command),
        ("study", study_command),
        ("train", train_command),
        ("generate", generate_command),
        ("convert", convert_command),
        ("distill", distill_command),
        ("eval", eval_command),
        ("show", show_command),
        ("recipes", recipes_command),
        ("bench", bench_command),
        ("simulate", simulate_command),
        ("sizes", sizes_command),
        ("doctor", doctor_command),
    ):
        app.command(name)(plainly(command))
    return app


def main() -> None:
    """Run the program with the arguments of this process."""
    try:
        app = build_app()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "rich", "safetensors", "matplotlib"):
            raise
        sys.exit(
            f"error: the command line needs the extra `cli` ({error.name} is missing): pip install 'farfield[cli]'"
        )
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
