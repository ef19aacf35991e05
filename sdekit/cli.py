"""The command line: `sdekit demo`, `likelihood`, `sample`, `train`.

Each command reads its arguments, calls the library and prints; nothing is computed here. What goes wrong is one line on
stderr and a nonzero exit status; `sdekit --traceback COMMAND` shows where it came from. Ctrl-C ends a command with
status 130 and says what was kept; so does SIGTERM during training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import click
import torch

from .commands import options as opt
from .commands.arrays import floating, read_array, require_suffix, write_arrays
from .commands.drawing import Drawing, draw
from .commands.evaluation import Options, evaluate, summarise, table
from .commands.kept import partial_of
from .commands.models import find_model, save_trained
from .commands.recipes import NetworkChoice, train_array, train_digits
from .divergence import Divergence, Exact, Hutchinson
from .runtime import Runtime
from .solver.base import Solver
from .solver.exponential import DPMSolverPP
from .solver.runge_kutta import RK4, Euler, Heun
from .solver.stochastic import EulerMaruyama
from .training import Recipe
from .units import Levels

_SOLVERS: dict[str, Callable[[], Solver | None]] = {
    "adams": lambda: None,  # the default of sdekit.sample
    "euler": Euler,
    "heun": Heun,
    "rk4": RK4,
    "dpm++": DPMSolverPP,
    "euler-maruyama": EulerMaruyama,
}

_NOT_OF_DIGITS = {"key", "kind", "width", "depth", "dropout", "batch_size", "learning_rate", "count", "low", "high"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sdekit")
@click.option("--traceback", is_flag=True, help="Show where an error came from.")
def main(traceback: bool) -> None:
    """Evaluate diffusion models: log-likelihoods with error bars, samples, training."""


@main.command()
@click.argument("data", type=opt.FILE)
@opt.model
@opt.key
@opt.first
@click.option("--count", "number", type=click.IntRange(1), help="How many rows of DATA.  [default: all the rest]")
@click.option("--out", type=opt.FILE, help="Write every sample's numbers: .npz or .safetensors.")
@click.option("--tolerance", type=float, default=1e-2, show_default=True, help="Nats per sample.")
@click.option("--nodes", type=click.IntRange(2), help="So many evaluations on a fixed grid, whatever the tolerance.")
@click.option("--divergence", type=click.Choice(["exact", "hutchinson"]), help="[default: exact to 128 dimensions]")
@click.option("--probes", type=click.IntRange(1), help="Of hutchinson.  [default: 1]")
@opt.levels
@opt.batch
@opt.seed
@opt.device
@opt.runtime
@opt.overwrite
@opt.quiet
@opt.one_line_errors
def likelihood(
    data: Path,
    name: str,
    key: str | None,
    first: int | None,
    number: int | None,
    out: Path | None,
    tolerance: float,
    nodes: int | None,
    divergence: Literal["exact", "hutchinson"] | None,
    probes: int | None,
    count: int | None,
    low: float,
    high: float,
    batch_size: int,
    seed: int,
    device: str | None,
    runtime: Runtime,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Print the mean log-likelihood of DATA (.npy, .npz, .safetensors) and its errors, in nats and bits/dim.

    With --out, finished batches are kept beside it: the same command goes on where an interrupted one stopped.
    """
    if out is not None:
        if require_suffix(out) == ".npy":
            raise click.ClickException("several numbers a sample do not go into a .npy file: name a .npz file.")
        opt.require_place(out, overwrite)
    options = Options(tolerance, _divergence(divergence, probes), seed, nodes=nodes)
    levels = None if count is None else Levels(count, low, high)
    whole = floating(read_array(data, key), levels, seed)  # of a shard too: noise has its place in the whole
    rows = opt.rows_of(len(whole), first, number)
    x = whole[rows]
    where = opt.choose_device(device)
    model = find_model(name)[0].to(where)
    partial = None if out is None else partial_of(out)
    scores = evaluate(
        *(model, x, options),
        first=rows.start,
        total=len(whole),
        batch_size=batch_size,
        partial=partial,
        device=where,
        progress=not quiet,
        runtime=runtime,
    )
    summary = summarise(scores)
    click.echo("\n".join(table(summary, math.prod(x.shape[1:]), levels)))
    if out is not None and partial is not None:
        facts = {"tolerance": tolerance, "nodes": nodes, "divergence": repr(options.divergence), "seed": seed}
        facts |= {"model": name, "first": rows.start}
        opt.require_free(out, overwrite, partial)
        write_arrays(out, scores._asdict(), {"options": json.dumps(facts), "summary": summary.to_json()})
        partial.unlink(missing_ok=True)
        click.echo(f"every sample's numbers in {str(out)!r}")
    if summary.arrived < summary.samples:
        lost = summary.samples - summary.arrived
        raise click.ClickException(f"{lost} of {summary.samples} samples did not arrive and are left out of the means.")


def _divergence(name: str | None, probes: int | None) -> Divergence | None:
    """The trace asked for, None for the library's default."""
    if probes is not None and name != "hutchinson":
        raise click.ClickException("--probes belongs to --divergence hutchinson: pass both.")
    if name is None:
        return None
    return Exact() if name == "exact" else Hutchinson(probes=probes or 1)


@main.command()
@opt.model
@click.option("--count", type=click.IntRange(1), default=64, show_default=True, help="How many.")
@opt.first
@opt.shape
@click.option("--out", type=opt.FILE, required=True, help="A .npy, .npz or .safetensors file.")
@click.option("--picture", type=opt.FILE, help="Draw the samples (.png, .pdf, .svg).")
@click.option("--steps", type=click.IntRange(1), help="[default: 32; 100 with --eta]")
@click.option("--solver", type=click.Choice(list(_SOLVERS)), help="[default: adams; SDE-DPM-Solver++(2) with --eta]")
@click.option("--eta", type=click.FloatRange(0.0), default=0.0, show_default=True, help="Noise; 0: none, 1: the SDE.")
@opt.batch
@opt.seed
@opt.device
@opt.runtime
@opt.overwrite
@opt.quiet
@opt.one_line_errors
def sample(
    name: str,
    count: int,
    first: int | None,
    shape: tuple[int, ...] | None,
    out: Path,
    picture: Path | None,
    steps: int | None,
    solver: str | None,
    eta: float,
    batch_size: int,
    seed: int,
    device: str | None,
    runtime: Runtime,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Write samples of a model to --out. Sample i depends on the seed and on i alone.

    Finished batches are kept beside --out: the same command goes on where an interrupted one stopped.
    """
    require_suffix(out)
    opt.require_place(out, overwrite)
    if picture is not None:
        from .plot import require_picture

        require_picture(picture)
        opt.require_place(picture, overwrite)
    where = opt.choose_device(device)
    model, known = find_model(name)
    event = shape if shape is not None else known
    if event is None:
        raise click.ClickException(f"{name!r} does not say the shape of a sample: pass --shape, for example 3,32,32.")
    drawing = Drawing(count, event, first, steps, None if solver is None else _SOLVERS[solver](), eta, seed)
    partial = partial_of(out)
    x = draw(
        *(model.to(where), drawing),
        batch_size=batch_size,
        partial=partial,
        device=where,
        progress=not quiet,
        runtime=runtime,
    )
    opt.require_free(out, overwrite, partial)
    write_arrays(out, {"x": x})
    partial.unlink(missing_ok=True)
    click.echo(f"{count} samples of shape {event} in {str(out)!r}")
    if picture is not None:
        from .plot import samples_figure, save

        save(samples_figure(x), picture)
        click.echo(f"picture in {str(picture)!r}")


@main.command()
@click.argument("data")
@opt.key
@click.option("--out", type=opt.FILE, required=True, help="The trained model, a .safetensors file.")
@click.option("--net", "kind", type=click.Choice(["mlp", "unet"]), default="mlp", show_default=True)
@click.option("--width", type=click.IntRange(1), default=128, show_default=True, help="Of layers, or channels.")
@click.option("--depth", type=click.IntRange(1), default=3, show_default=True, help="Layers, or resolutions.")
@click.option("--dropout", type=click.FloatRange(0.0, 1.0, max_open=True), default=0.0, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=8000, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Samples a step.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True)
@opt.levels
@opt.seed
@opt.device
@opt.overwrite
@opt.quiet
@opt.one_line_errors
def train(
    data: str,
    key: str | None,
    out: Path,
    kind: Literal["mlp", "unet"],
    width: int,
    depth: int,
    dropout: float,
    steps: int,
    batch_size: int,
    learning_rate: float,
    count: int | None,
    low: float,
    high: float,
    seed: int,
    device: str | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Train a small network on DATA (an array file, scaled to about unit size), or `digits` for the shipped recipe.

    A checkpoint beside --out is kept: the same command goes on where an interrupted one stopped; others are refused.
    """
    if out.suffix != ".safetensors":
        raise click.ClickException(f"{str(out)!r}: a .safetensors file is needed.")
    opt.require_place(out, overwrite)
    checkpoint = out.with_name(f"{out.stem}.checkpoint.safetensors")
    where, shown = opt.choose_device(device), not quiet
    if data == "digits":
        opt.refuse_given(_NOT_OF_DIGITS, "the recipe of `sdekit train digits` sets it: leave it out.")
        model, architecture = train_digits(steps, seed, checkpoint, shown, where)
    else:
        levels = None if count is None else Levels(count, low, high)
        recipe = Recipe(steps=steps, learning_rate=learning_rate, seed=seed)
        choice = NetworkChoice(kind, width, depth, dropout)
        x = read_array(Path(data), key)
        model, architecture = train_array(x, levels, choice, recipe, batch_size, checkpoint, where, progress=shown)
    opt.require_free(out, overwrite, checkpoint)
    save_trained(out, model, architecture)
    checkpoint.unlink(missing_ok=True)
    click.echo(f"{sum(p.numel() for p in model.parameters())} parameters, {steps} steps; model in {str(out)!r}")


@main.command()
@click.option("--out", type=opt.FILE, default=Path("sdekit-demo.png"), show_default=True, help="The picture.")
@opt.seed
@opt.quiet
@opt.one_line_errors
def demo(out: Path, seed: int, quiet: bool) -> None:
    """Evaluate the shipped digits network on held-out images: bits/dim, its uncertainties, its cost, a picture."""
    from .demo import run

    # The network is small: a second thread gains little, and beside other work threads spin waiting for one another.
    torch.set_num_threads(1)
    for line in run(out, seed=seed, progress=not quiet):
        click.echo(line)
