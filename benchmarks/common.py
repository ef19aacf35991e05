"""What every benchmark shares: its arguments, the record of a run, goals, and a cache.

A run ends as one JSON file in `results/`, with what it was run with, and as the same tables in markdown. Only what no
solver of sdekit has influenced is cached: trained networks and reference solutions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
RESULTS = HERE / "results"

Cell = str | float | int


def arguments(
    description: str | None, add: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """The arguments every benchmark takes, parsed; torch is set to the number of threads asked for."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a small version, to see that it runs; no goal is judged by it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the problems: another seed draws fresh ones")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    if add is not None:
        add(parser)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def _git(*command: str) -> str:
    try:
        done = subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(chosen: argparse.Namespace) -> dict[str, Cell]:
    """What a run's numbers depend on besides the code: machine, versions, commit, arguments."""
    changed = any(
        not line.startswith("??") for line in _git("status", "--porcelain", "--", str(HERE.parent)).splitlines()
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": (_git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else ""),
        "load": round(load, 1),
        "date": time.strftime("%Y-%m-%d"),
        **{name: str(value) for name, value in vars(chosen).items() if name not in ("threads",)},
    }


def show(value: Cell) -> str:
    """A number as it stands in a table."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    if value != 0 and (abs(value) < 1e-2 or abs(value) >= 1e5):
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


@dataclass
class Table:
    """A titled table; `note` says what its columns mean."""

    title: str
    columns: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        """The table in markdown, columns aligned."""
        cells = [list(self.columns), *[[show(value) for value in row] for row in self.rows]]
        widths = [max(len(row[j]) for row in cells) for j in range(len(self.columns))]
        lines = [
            "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
            for row in cells
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([f"**{self.title}**", "", *lines, *(["", self.note] if self.note else [])])


@dataclass(frozen=True)
class Goal:
    """What was to be reached: low <= value <= high."""

    name: str
    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def met(self) -> bool:
        return self.low <= self.value <= self.high

    def row(self) -> list[Cell]:
        wanted = f"<= {self.high:g}" if self.low == -math.inf else f">= {self.low:g}"
        if self.low > -math.inf and self.high < math.inf:
            wanted = f"{self.low:g} .. {self.high:g}"
        return [self.name, self.value, wanted, "yes" if self.met else "**no**"]


@dataclass
class Report:
    """The record of one run: tables and goals as they come in, written by `save`."""

    name: str
    chosen: argparse.Namespace
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    facts: dict[str, Cell] = field(init=False)

    def __post_init__(self) -> None:
        self.facts = environment(self.chosen)  # as the run begins: the commit may change under a long one

    def table(self, title: str, columns: Sequence[str], note: str = "") -> Table:
        """A new table of this report."""
        self.tables.append(Table(title, columns, [], note))
        return self.tables[-1]

    def markdown(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        parts = [f"`python -m benchmarks.{self.name}`: {facts}, {time.monotonic() - self.began:.0f} s in all"]
        if self.goals:
            goals = Table("Goals", ["goal", "value", "wanted", "met"], [goal.row() for goal in self.goals])
            parts.append(goals.markdown())
        return "\n\n".join([*parts, *[table.markdown() for table in self.tables]]) + "\n"

    def save(self, final: bool = True) -> None:
        """Writes the report as JSON and markdown, and prints it; a quick run goes where it replaces no full one.

        Args:
            final: False: what there is so far, written to the cache only, so that an interrupted run is not lost.
        """
        folder = CACHE / "unfinished" if not final else RESULTS / "quick" if self.chosen.quick else RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        text = self.markdown()
        record = {
            "benchmark": self.name,
            "environment": self.facts,
            "seconds": round(time.monotonic() - self.began, 1),
            "goals": [
                {"name": g.name, "value": _plain(g.value), "wanted": g.row()[2], "met": g.met} for g in self.goals
            ],
            "tables": [
                {
                    "title": t.title,
                    "columns": list(t.columns),
                    "rows": [[_plain(c) for c in r] for r in t.rows],
                    "note": t.note,
                }
                for t in self.tables
            ],
        }
        (folder / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / f"{self.name}.md").write_text(text)
        if final:
            print("\n" + text)


def _plain(value: Cell) -> Cell | None:
    """A value as JSON knows it: numbers that are not finite become null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def digest(*parts: Tensor | str | float | int) -> str:
    """A short text that differs whenever the parts do."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            plain = part.detach().cpu().contiguous()
            state.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            state.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            state.update(repr(part).encode())
    return state.hexdigest()[:16]


def cached(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `make` returns, kept under `name` (which is to hold a digest of all they depend on)."""
    path = CACHE / f"{name}.safetensors"
    if path.exists():
        return load_file(str(path))
    made = {key: value.detach().cpu().contiguous() for key, value in make().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file(made, str(part))
    os.replace(part, path)
    return made


def needed(rungs: Sequence[tuple[float, float]], wanted: float) -> float:
    """What an error of `wanted` costs on a ladder of (cost, error), log-linear; NaN where no rung is as close."""
    for number, (cost, error) in enumerate(rungs):
        if error > wanted:
            continue
        if number == 0:
            return cost
        before, above = rungs[number - 1]
        share = math.log(above / wanted) / math.log(above / error) if math.isfinite(above) else 1.0
        return before * (cost / before) ** share
    return math.nan


def quantile(values: Tensor, share: float) -> float:
    """The quantile of a sample; NaN counts as infinite."""
    if not values.numel():
        return math.nan
    ordered = values.double().nan_to_num(nan=math.inf).sort().values
    return float(ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))])


def share_within(errors: Tensor, bound: float | Tensor) -> float:
    """The share of errors of at most `bound`; NaN counts as outside."""
    return float((errors.abs() <= bound).double().mean()) if errors.numel() else math.nan
