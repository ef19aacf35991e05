"""The house rules that a machine can check: who may import whom, sizes, randomness, files that execute nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sdekit"

# A module imports only from modules above it. `__init__.py` collects names and is exempt; importing a package counts
# as importing the last of its modules.
ORDER = [
    "errors",
    "_tensor",
    "_numbers",
    "_checks",
    "_random",
    "_interrupt",
    "_replace",
    "_checkpoint",
    "_memory",
    "units",
    "sde.base",
    "sde.vp",
    "sde.ve",
    "sde.flow",
    "model.parameterization",
    "model._file",
    "model._labels",
    "model._seen",
    "model._caller",
    "model.score_model",
    "model.guidance",
    "model.nets",
    "_components",
    "targets",
    "grid",
    "_products",
    "divergence",
    "ledger",
    "terms",
    "likelihood_flow",
    "brownian",
    "brownian_motion",
    "solver.base",
    "solver.start",
    "solver.tableau",
    "solver.runge_kutta",
    "solver.newton",
    "solver.adams",
    "solver.semilinear",
    "solver.multistep",
    "solver.singlestep",
    "solver.exponential",
    "solver.exponential_sde",
    "solver.unipc",
    "solver.stochastic",
    "solver.sra",
    "solver.edm",
    "solver.predictor_corrector",
    "solver.langevin",
    "controller",
    "pid",
    "_fit",
    "budget",
    "solution",
    "loop",
    "parts",
    "folding",
    "fusing",
    "tracing",
    "compiled",
    "resident",
    "capture",
    "captured",
    "runtime",
    "driver",
    "grid_behind",
    "grid_books",
    "grid_density",
    "integrate",
    "ends",
    "_method",
    "loss",
    "_levels",
    "training",
    "likelihood",
    "comparison",
    "dequantize",
    "discrete",
    "adjoint",
    "gradient",
    "accuracy.order",
    "accuracy.paths",
    "accuracy.stochastic",
    "tape",
    "shortening",
    "recording",
    "playback",
    "prior",
    "_sampler",
    "sampling",
    "plan",
    "sampled_density",
    "bounds",
    "pointwise",
    "ito",
    "sandwich",
    "sampler_density",
    "checkup",
    "_nests",
    "chunking",
    "interop.scipy",
    "zoo._baselines",
    "zoo._cells",
    "zoo.digits",
    "commands.arrays",
    "commands.kept",
    "commands.evaluation",
    "commands.drawing",
    "commands.models",
    "commands.recipes",
    "commands.options",
    "plot",
    "demo",
    "cli",
    "__main__",
]

# Longer than the rule allows, each with the reason why it is one idea all the same.
LONG_FUNCTIONS: dict[str, str] = {}
LONG_MODULES: dict[str, str] = {}
FUNCTION_LINES, MODULE_LINES = 60, 300

# Draws from torch's global generator, each with the reason why no result depends on who else draws from it.
_LOOKED_AT = "looked at, to find out networks that draw"
GLOBAL_DRAWS = {"capture:random.getstate": _LOOKED_AT, "capture:np.random.get_state": _LOOKED_AT}


def name_of(path: Path) -> str:
    """`solver.adams` for sdekit/solver/adams.py, `solver` for its package, the empty string for sdekit itself."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in FILES.items()}
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}
MODULES = sorted(set(FILES) - PACKAGES)


def imported(name: str) -> Iterator[tuple[int, str]]:
    """Line and name of every sdekit module or package that module `name` imports, anywhere in its text."""
    here = name.split(".")[:-1]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "sdekit":
                    yield node.lineno, alias.name.removeprefix("sdekit").removeprefix(".")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = here[: len(here) - node.level + 1] + (node.module.split(".") if node.module else [])
            elif node.module and node.module.split(".")[0] == "sdekit":
                base = node.module.split(".")[1:]
            else:
                continue
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                yield node.lineno, inner if inner in FILES else ".".join(base)


def position(name: str) -> int:
    """The place of a module in the order; of a package, the place of its last module."""
    if name in PACKAGES:
        inside = [place for place, other in enumerate(ORDER) if not name or other.startswith(name + ".")]
        return max(inside)
    return ORDER.index(name)


def dotted(node: ast.expr) -> str:
    """`torch.nn.init` for that expression, with a leading `?` where it starts from a call or an index."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(name: str) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func)


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many lines the docstring of a function takes: explaining more is no reason to split."""
    if ast.get_docstring(node) is None:
        return 0
    text = node.body[0]
    return (text.end_lineno or text.lineno) - text.lineno + 1


def test_every_module_has_its_place_in_the_order():
    assert sorted(set(MODULES) - set(ORDER)) == [], "put new modules into ORDER, below all that they import"
    assert sorted(set(ORDER) - set(MODULES)) == [], "ORDER names modules that are not there"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_above(name):
    wrong = [
        f"sdekit/{name.replace('.', '/')}.py:{line} imports sdekit.{other}"
        for line, other in imported(name)
        if position(other) >= position(name)
    ]
    assert not wrong


def test_importing_sdekit_imports_no_optional_package():
    optional = ("torchdiffeq", "torchsde", "torchode", "sklearn", "matplotlib", "click")
    code = f"import sys, sdekit; print([name for name in {optional} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_only_interop_and_demo_import_the_peers():
    peers = {"torchdiffeq", "torchsde", "torchode", "diffusers", "k_diffusion"}
    wrong = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            hit = peers & {n.split(".")[0] for n in names}
            if hit and name.split(".")[0] not in {"interop", "demo"}:
                wrong.append(f"{name} imports {sorted(hit)}")
    assert not wrong


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_says_what_it_is_for(name):
    assert ast.get_docstring(TREES[name])


@pytest.mark.parametrize("name", MODULES)
def test_functions_and_modules_are_short(name):
    wrong = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
            if length > FUNCTION_LINES and f"{name}.{node.name}" not in LONG_FUNCTIONS:
                wrong.append(f"{name}.{node.name} has {length} lines besides its docstring; {FUNCTION_LINES} at most")
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    if lines > MODULE_LINES and name not in LONG_MODULES:
        wrong.append(f"{name} has {lines} lines; {MODULE_LINES} at most")
    assert not wrong


SEEDED = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
NEVER = {"rand_like", "randn_like", "randint_like", "manual_seed", "seed"}
IN_PLACE = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_draws_from_a_global_generator(name):
    wrong = []
    for node, called in calls(name):
        keyed = any(keyword.arg == "generator" for keyword in node.keywords)
        last = called.rsplit(".", 1)[-1]
        draws = (
            (called.startswith("torch.") and last in SEEDED and not keyed)
            or (called.startswith("torch.") and last in NEVER)
            or ("." in called and last in IN_PLACE and not keyed)
            or (called.startswith(("np.random.", "numpy.random.")) and last != "default_rng")
            or called.startswith("random.")
        )
        if draws and f"{name}:{called}" not in GLOBAL_DRAWS:
            wrong.append(f"{name}:{node.lineno} calls {called} without a generator")
    assert not wrong


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_that_is_read_can_run_code(name):
    unsafe = {"torch.save", "torch.load"}
    wrong = [f"{name}:{node.lineno} calls {called}" for node, called in calls(name) if called in unsafe]
    for node in ast.walk(TREES[name]):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        wrong += [f"{name}:{node.lineno} imports {n}" for n in names if n in {"pickle", "dill", "joblib", "shelve"}]
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            wrong.append(f"{name}:{node.lineno} allows pickle")
    assert not wrong


def test_importing_the_package_does_not_import_scipy():
    """It takes as long as the package's own import."""
    code = "import sys, sdekit; print([name for name in sys.modules if name.split('.')[0] == 'scipy'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
