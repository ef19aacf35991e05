"""All benchmarks one after another, then the README: `python -m benchmarks [--quick]`."""

from __future__ import annotations

import subprocess
import sys

from .report import ORDER


def main() -> int:
    """Runs each in a process of its own, with the arguments given; the exit status is that of the last failure."""
    status = 0
    for name in ORDER:
        print(f"\n== {name}", flush=True)
        extra = ["--profile"] if name == "overhead" else []
        status = (
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:], *extra]).returncode or status
        )
    if "--quick" not in sys.argv:
        status = subprocess.run([sys.executable, "-m", "benchmarks.report"]).returncode or status
    return status


if __name__ == "__main__":
    raise SystemExit(main())
