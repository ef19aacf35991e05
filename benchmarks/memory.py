"""What a likelihood takes in memory: against dimensions, evaluations and probes, and within limits of the process.

    counted    bytes of tensors at the peak of one solve, a sample (CUDA's own counter there)
    resident   growth of the resident set at its peak, in a process of its own, a sample

The U-Net has 3 x 32 x 32 inputs and 0.6M parameters, the MLP four hidden layers of 512, untrained: memory does not
depend on weights. Limits are set by RLIMIT_AS on a process of its own: what it has mapped, and a little more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sdekit
from sdekit._memory import peak_of
from sdekit.divergence import Divergence, Exact, Hutchinson
from sdekit.model.nets import MLP, UNet
from sdekit.zoo import digits as zoo

from .common import HERE, Goal, Report, arguments
from .timing import best_device, device_name, least
from .unet_speed import Sized, cifar

MEGA = 1e6
FLAT = 1.1  # wanted, of the memory with many nodes over that with few


def perceptron(dim: int) -> sdekit.ScoreModel:
    torch.manual_seed(0)
    return _model(MLP((dim,), 512, 4, period=4.0))


def images() -> sdekit.ScoreModel:
    torch.manual_seed(0)
    return _model(UNet(3, 24, 3, attention=True, period=4.0))


def _model(net: nn.Module) -> sdekit.ScoreModel:
    return (
        sdekit.ScoreModel(net, sdekit.VPSDE(), sdekit.noise(sdekit.LogSigmaLabel(0.25)), data_std=1.0)
        .to(best_device())
        .eval()
    )


NETS: dict[str, Callable[[], tuple[sdekit.ScoreModel, tuple[int, ...]]]] = {
    "MLP 64-512x4": lambda: (perceptron(64), (64,)),
    "digits": lambda: (zoo.load().float().to(best_device()).eval(), (1, 8, 8)),
    "U-Net 3x32x32": lambda: (images(), (3, 32, 32)),
    "diffusers, 35.7M": lambda: (_model(Sized(*cifar())), (3, 32, 32)),
}


def points(batch: int, event: tuple[int, ...]) -> Tensor:
    return torch.randn(batch, *event, generator=torch.Generator().manual_seed(1)).to(best_device())


def solve(
    model: sdekit.ScoreModel, x: Tensor, nodes: int, divergence: Divergence, **options: Any
) -> sdekit.LogLikelihood:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sdekit.log_likelihood(model, x, nodes=nodes, divergence=divergence, throw=False, **options)


def counted(model: sdekit.ScoreModel, x: Tensor, nodes: int, divergence: Divergence) -> float:
    """Bytes a sample at the peak of a solve."""
    return peak_of(lambda: solve(model, x, nodes, divergence), x.device)[1] / x.shape[0]


# In processes of their own


def in_a_child(**spec: Any) -> dict[str, Any]:
    """What `child` prints in a fresh process; {"failed": text} where it ends otherwise."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def child(spec: dict[str, Any]) -> None:
    """One measurement, printed as JSON."""
    torch.set_num_threads(1)
    print(json.dumps(_resident(**spec) if spec.pop("what") == "resident" else _limited(**spec)))


def _resident(dim: int, batch: int, nodes: int, probes: int) -> dict[str, Any]:
    """Bytes a sample by which a solve raises the peak of the resident set."""
    model, x = perceptron(dim), points(batch, (dim,))
    solve(model, x[:2], 4, Hutchinson(probes))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    solve(model, x, nodes, Hutchinson(probes))
    return {"bytes": (_status("VmHWM") - before) / batch}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}.")


def _limited(how: str, batch: int, more: float) -> dict[str, Any]:
    """Whether a solve ends where the process may map `more` bytes beyond what it has: the same values as alone."""
    import resource

    model, x = images(), points(batch, (3, 32, 32))
    alone = solve(model, x[:1], 3, Hutchinson()).log_prob
    few = MLP((192,), 2048, 2).eval()
    wide, y = _model(few), points(64, (192,))
    expected = _trace(wide, y[:1], Exact(8))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + int(more), resource.getrlimit(resource.RLIMIT_AS)[1]))

    def chunks(size: int | None) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sdekit.chunked(
                lambda part, rows: solve(model, part, 3, Hutchinson(), indices=rows), x, chunk=size
            ).log_prob

    calls: dict[str, Callable[[], bool]] = {
        "whole": lambda: bool(torch.allclose(_whole(model, x)[:1], alone, atol=1e-2)),
        "chunked, chosen": lambda: bool(torch.allclose(chunks(None)[:1], alone, atol=1e-2)),
        "chunked, halved": lambda: bool(torch.allclose(chunks(batch)[:1], alone, atol=1e-2)),
        "Exact, chosen": lambda: bool(torch.allclose(_trace(wide, y, Exact())[:1], expected, atol=1e-2)),
        "Exact, halved": lambda: bool(torch.allclose(_trace(wide, y, Exact(192))[:1], expected, atol=1e-2)),
    }
    return {"right": calls[how]()}


def _whole(model: sdekit.ScoreModel, x: Tensor) -> Tensor:
    return sdekit.log_likelihood(model, x, nodes=3, divergence=Hutchinson()).log_prob


def _trace(model: sdekit.ScoreModel, x: Tensor, divergence: Divergence) -> Tensor:
    label = torch.full((x.shape[0],), 0.5, dtype=torch.float64)
    return divergence.evaluate(lambda state: model.output(state, label), x, None).traces[:, 0]


# The parts of the report


def growth(report: Report, quick: bool) -> None:
    """Against dimensions, nodes and probes."""
    device, batch = best_device(), 64 if quick else 256
    table = report.table(
        f"memory of a likelihood, bytes a sample, MLP of D dimensions, {device_name(device)}",
        ["D", "nodes", "probes", "counted", "of which numbers of the state", "resident"],
        f"Batch {batch}. A number of the state is 4 bytes.",
    )
    cases = (
        [(d, 16, 1) for d in (64, 768, 3072)]
        + [(d, n, 1) for d in (64, 768) for n in (64, 256)]
        + [(768, 16, p) for p in (4, 16)]
    )
    kept: dict[tuple[int, int, int], tuple[float, float]] = {}
    for dim, nodes, probes in tqdm(cases, desc="growth"):
        x = points(batch, (dim,))
        taken = counted(perceptron(dim), x, nodes, Hutchinson(probes))
        own = float("nan")
        if device.type == "cpu" and sys.platform.startswith("linux"):
            own = in_a_child(what="resident", dim=dim, batch=batch, nodes=nodes, probes=probes).get("bytes", own)
        kept[dim, nodes, probes] = taken, own
        table.rows.append([dim, nodes, probes, taken, taken / (4 * dim), own])
    for place, name in enumerate(("counted", "resident")):
        few, many = kept[768, 16, 1][place], kept[768, 256, 1][place]
        if few == few:
            report.goals.append(Goal(f"{name} memory with 256 nodes / with 16", many / few, high=FLAT))


def modes(report: Report, quick: bool) -> None:
    """Reverse mode beside forward mode."""
    device = best_device()
    table = report.table(
        f"vjp or jvp: one evaluation, {device_name(device)}",
        ["network", "batch", "probes", "mode", "peak, kB a sample", "us a sample", "memory / vjp", "time / vjp"],
        "Peak: bytes of tensors, weights apart (CUDA's own counter there).",
    )
    sizes = {"MLP 64-512x4": (16, 256), "digits": (16, 256), "U-Net 3x32x32": (2, 8)}
    try:
        cifar()
        sizes["diffusers, 35.7M"] = (1,)
    except (ImportError, RuntimeError):  # not installed, or not fit for the other packages that are
        pass
    for name, batches in tqdm(sizes.items(), desc="modes"):
        model, event = NETS[name]()
        for batch in batches[:1] if quick else batches:
            x = points(batch, event).flatten(1)
            label = torch.full((batch,), 0.5, dtype=torch.float64, device=device)
            for probes in (1, 4):
                base = (0.0, 0.0, False)
                for mode in ("vjp", "jvp", "auto"):
                    found = _one_evaluation(model, event, x, label, probes, mode, 2 if quick else 5)
                    base = found if mode == "vjp" else base
                    ratios = [found[0] / base[0], found[1] / base[1]]
                    label_of = f"{mode}, fell back" if found[2] else mode
                    table.rows.append(
                        [name, batch, probes, label_of, 1e-3 * found[0] / batch, 1e6 * found[1] / batch, *ratios]
                    )


def _one_evaluation(
    model: sdekit.ScoreModel, event: tuple[int, ...], x: Tensor, label: Tensor, probes: int, mode: str, repeats: int
) -> tuple[float, float, bool]:
    """Peak bytes, least seconds, and whether forward mode was asked for in vain."""
    divergence = Hutchinson(probes, mode=mode)  # type: ignore[arg-type]
    keys = Hutchinson.keys(0, torch.arange(x.shape[0], device=x.device))
    drawn = divergence.draw(keys, torch.zeros_like(keys[:, 0]), x.shape[1], x.dtype)

    def evaluate() -> object:
        with torch.no_grad():
            return divergence.evaluate(lambda s: model.output(s.reshape(-1, *event), label).flatten(1), x, drawn)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        evaluate()
        fell_back = any(issubclass(one.category, sdekit.SdekitWarning) for one in said)
        return float(peak_of(evaluate, x.device)[1]), least(evaluate, repeats, x.device), fell_back


def limits(report: Report, quick: bool) -> None:
    """Within an address space that a batch of one fits and the whole does not."""
    if not sys.platform.startswith("linux"):
        return
    batch = 128 if quick else 256
    model = images().cpu()
    one = peak_of(lambda: solve(model, points(1, (3, 32, 32)).cpu(), 3, Hutchinson()), torch.device("cpu"))[1]
    more = 3.0 * one + 200 * MEGA  # what libraries map for themselves when they are first used
    table = report.table(
        f"in a process that may map {more / MEGA:.0f} MB more",
        ["what", "ends", "the right value"],
        f"Chunked: {batch} samples of the U-Net, {one / MEGA:.1f} MB each by count. Exact: traces of 64 samples in "
        "192 dimensions of an MLP 2048 wide; halved is Exact(192), all products at once.",
    )
    for how in tqdm(("whole", "chunked, chosen", "chunked, halved", "Exact, chosen", "Exact, halved"), desc="limits"):
        found = in_a_child(what="limited", how=how, batch=batch, more=more)
        table.rows.append(
            [how, "no" if "failed" in found else "yes", str(found.get("right", found.get("failed")))[:60]]
        )
        if how != "whole":
            report.goals.append(
                Goal(f"{how}: ends within the limit, with the right value", int(found.get("right", 0)), 1)
            )


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--child", help=argparse.SUPPRESS)

    chosen = arguments(__doc__, more)
    if chosen.child:
        child(json.loads(chosen.child))
        return
    del chosen.child
    report = Report("memory", chosen)
    growth(report, chosen.quick)
    modes(report, chosen.quick)
    limits(report, chosen.quick)
    report.save()


if __name__ == "__main__":
    main()
