"""Writes the tables of the last runs into README.md, between its two markers: nothing there is copied by hand."""

from __future__ import annotations

from .common import HERE, RESULTS

ORDER = (
    "likelihood_exact",
    "likelihood_learned",
    "likelihood_fresh",
    "likelihood_pooled",
    "total_error",
    "likelihood_images",
    "likelihood_stress",
    "adaptive_order",
    "control_ideas",
    "probes",
    "solver_error",
    "control_variants",
    "invariance",
    "budget",
    "estimators",
    "discrete",
    "comparisons",
    "gradients",
    "amortised",
    "finetune",
    "orders",
    "work_precision",
    "predictor_corrector",
    "sampling_overhead",
    "noise",
    "runtime",
    "unet_speed",
    "slots",
    "memory",
    "scaling",
    "network_variants",
    "overhead",
)
BEGIN, END = "<!-- results begin -->", "<!-- results end -->"


def assembled() -> str:
    """The markdown of all results that there are, one heading a benchmark."""
    parts = []
    for name in ORDER:
        alone = [path for path in sorted(RESULTS.glob(f"{name}_*.md")) if path.stem not in ORDER]  # of one group
        for path in (RESULTS / f"{name}.md", *alone):
            if path.exists():
                parts.append(f"## {path.stem}\n\n{path.read_text().strip()}")
    return "\n\n".join(parts)


def main() -> None:
    path = HERE / "README.md"
    text = path.read_text()
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    path.write_text(f"{head}{BEGIN}\n\n{assembled()}\n\n{END}{tail}")
    print(f"{path.name}: {len(list(RESULTS.glob('*.md')))} results")


if __name__ == "__main__":
    main()
