"""What the commands have in common: options, and errors in one line."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import torch

from ..errors import SdekitError
from ..runtime import Runtime
from .kept import Interrupted

Command = TypeVar("Command", bound=Callable[..., Any])

FILE = click.Path(dir_okay=False, path_type=Path)


class Stopped(click.ClickException):
    """Ctrl-C, with the exit status that shells give it."""

    exit_code = 130


def one_line_errors(command: Command) -> Command:
    """`command`, with what it raises turned into one line on stderr and an exit status of 1, or 130 for Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt as stop:
            raise Stopped("interrupted.") from stop
        except (SdekitError, ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
            if click.get_current_context().find_root().params.get("traceback"):
                raise
            message = f"{error}".strip().partition("\n")[0]  # torch adds whole tables of what it can do
            if isinstance(error, ModuleNotFoundError):
                message += '; pip install "sdekit[demo]" brings what the commands need.'
            kind = Stopped if isinstance(error, Interrupted) else click.ClickException
            raise kind(message or type(error).__name__) from error

    return run  # type: ignore[return-value]


def choose_device(name: str | None) -> torch.device:
    """The device of that name; CUDA, where there is one, without a name."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise click.ClickException(f"--device {name}: there is no such device; cpu or cuda, for example.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(f"--device {name}: this machine, or this build of PyTorch, has no CUDA device.")
    return device


def require_free(path: Path, overwrite: bool, kept: Path | None = None) -> None:
    """Raises unless `path` may be written; the message says that what was computed is in `kept`."""
    if path.exists() and not overwrite:
        rest = "" if kept is None else f"; what was computed is kept in {str(kept)!r}"
        raise click.ClickException(f"{str(path)!r} exists; name another file, or pass --overwrite{rest}.")


def require_place(path: Path, overwrite: bool) -> None:
    """Raises unless `path` may be written and can be: before the work, not after it. Makes its directory."""
    require_free(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise click.ClickException(
            f"{str(path)!r} cannot be written: {str(path.parent)!r} is not a directory that can be written to "
            f"({reason}); name a file elsewhere."
        ) from error


def refuse_given(names: set[str], reason: str) -> None:
    """Raises where options of the current command whose parameters have these names were given."""
    context = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names
        and context.get_parameter_source(parameter.name) is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        raise click.ClickException(f"{', '.join(given)}: {reason}")


def rows_of(count: int, first: int | None, number: int | None) -> slice:
    """The rows of a shard of an array of `count` rows.

    Raises:
        click.ClickException: The array does not have all of them.
    """
    start = first or 0
    stop = count if number is None else start + number
    if not start < stop <= count:
        asked = f"--first {start}" + ("" if number is None else f" --count {number}")
        raise click.ClickException(f"{asked}: the array has the rows 0 to {count - 1} only.")
    return slice(start, stop)


def _event(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"{text!r}; numbers with commas are needed, for example 3,32,32.")
    return sizes


key = click.option("--key", help="Name of the array in a .npz or .safetensors file that holds several.")
seed = click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is random.")
first = click.option("--first", type=click.IntRange(0), help="Number of the first sample: for shards.  [default: 0]")
batch = click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True, help="Samples at a time.")
device = click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cuda if there is one]")
runtime = click.option(
    "--runtime",
    type=click.Choice(get_args(Runtime)),
    default="auto",
    show_default=True,
    help="How a step runs; compile: tens of seconds once for a kind of solve, then less overhead a step.",
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace the result if it exists.")
quiet = click.option("--quiet", is_flag=True, help="No progress bar.")
model = click.option("--model", "name", required=True, help="digits, a file of `sdekit train`, or module:function.")
shape = click.option("--shape", callback=_event, help="Of a sample, as in 3,32,32; needed for module:function.")


def levels(command: Command) -> Command:
    """Adds the options that say what an array of integers stands for."""
    for option in (
        click.option("--high", type=float, default=1.0, show_default=True, help="Upper edge of the last level."),
        click.option("--low", type=float, default=-1.0, show_default=True, help="Lower edge of the first level."),
        click.option("--levels", "count", type=click.IntRange(2), help="Of the data: integers are dequantised."),
    ):
        command = option(command)
    return command
