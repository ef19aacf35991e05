"""What the network itself gains by torch.compile, by the channels-last layout and by bfloat16.

Forward + vjp, and a solve: what is left to gain where little is added to the network (`benchmarks.runtime`). Each
variant stands beside the network as it is, run by run; a fixed grid of 24 nodes and one fixed probe. The last column is
how far log p moves. The backward pass of a compiled network makes the gradients of all that requires one: of its
weights too, unless they are frozen before.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sdekit

from .common import Report, Table, arguments
from .overhead import bare
from .overhead import network as perceptron
from .peers import fixed_probe
from .timing import best_device, device_name, paired
from .unet_speed import made

NODES = 24
PROBE = sdekit.Hutchinson(probes=1, fresh=False)
Variant = Callable[[nn.Module], nn.Module]
VARIANTS: dict[str, Variant] = {
    "torch.compile": lambda net: torch.compile(net.requires_grad_(False)),  # type: ignore[dict-item, return-value]
    "torch.compile, not frozen": lambda net: torch.compile(net.requires_grad_()),  # type: ignore[dict-item, return-value]
    "channels-last": lambda net: net.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "bfloat16": lambda net: net.bfloat16(),
}


def log_prob(model: sdekit.ScoreModel, x: Tensor) -> sdekit.LogLikelihood:
    """On a fixed grid, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sdekit.log_likelihood(model, x, divergence=PROBE, nodes=NODES, throw=False)


def compare(table: Table, name: str, model: sdekit.ScoreModel, x: Tensor, repeats: int) -> None:
    """All variants of one network on one batch."""
    probe = fixed_probe(x).reshape(x.shape)
    reference = log_prob(model, x).log_prob
    for variant, change in VARIANTS.items():
        if variant == "channels-last" and x.dim() < 4:
            continue
        net = change(copy.deepcopy(model.net))
        other = sdekit.ScoreModel(net, model.sde, model.parameterization, model.data_std)
        given = probe.to(other.network_dtype(x))

        def call(net: sdekit.ScoreModel = other, v: Tensor = given) -> int:
            return bare(net, x.to(v.dtype), v, 8)

        floor, took, ratio = paired(call, lambda: bare(model, x, probe, 8), repeats, x.device)
        _, _, solve = paired(
            lambda other=other: log_prob(other, x).stats.calls,  # type: ignore[misc]
            lambda: log_prob(model, x).stats.calls,
            max(2, repeats // 2),
            x.device,
        )
        moved = float((log_prob(other, x).log_prob - reference).abs().max())
        table.rows.append([name, x.shape[0], variant, 1e3 * floor, 1e3 * took, ratio, solve, moved])


def main() -> None:
    chosen = arguments(__doc__)
    report, device = Report("network_variants", chosen), best_device()
    table = report.table(
        f"beside the network as it is, float32, {device_name(device)}",
        [
            "network",
            "batch",
            "variant",
            "as it is, ms",
            "variant, ms",
            "ratio",
            "of a solve",
            "log p moves by, nats",
        ],
    )
    flat, (images, event) = perceptron(64).to(device), made(device)
    cases = [("MLP 64-512x3", flat, (64,), batch) for batch in ((1, 64) if chosen.quick else (1, 64, 1024))]
    for name, model, shape, batch in tqdm([*cases, ("U-Net", images, event, 4)], desc="networks"):
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1)).to(device)
        compare(table, name, model, x, 2 if chosen.quick else 6)
        report.save(final=False)
    report.save()


if __name__ == "__main__":
    main()
