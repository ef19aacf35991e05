"""sdekit: diffusion models evaluated, not only sampled.

A continuous-time SDE/ODE toolkit in PyTorch: log-likelihoods with an error bar and an error estimate, reverse-SDE and
probability-flow solvers, exact targets to measure them against.
"""

from . import grid, targets
from .brownian import BrownianPath, IndependentIncrements
from .controller import PID, Controller, FixedGrid, Nats
from .divergence import Divergence, Exact, Hutchinson
from .errors import (
    NetworkError,
    PartialResultWarning,
    SdekitError,
    SdekitWarning,
    SmoothnessWarning,
    SolveError,
    ToleranceWarning,
)
from .integrate import integrate
from .likelihood import log_likelihood
from .likelihood_flow import LikelihoodFlow
from .model import (
    LogSigmaLabel,
    Parameterization,
    ScoreModel,
    SigmaLabel,
    TimeLabel,
    data,
    edm,
    noise,
    score,
    table_label,
    v,
    velocity,
)
from .sampling import decode, encode, sample
from .sde import SDE, VESDE, VPSDE, CosineVPSDE, KarrasSDE, RectifiedFlow, SubVPSDE, TableVPSDE
from .solution import LogLikelihood, Solution, Stats, Status
from .solver import (
    DDIM,
    DEIS,
    RK4,
    SEEDS,
    Adams,
    BogackiShampine,
    Dopri5,
    Dopri8,
    DPMSolver,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
    RungeKutta,
    SASolver,
    SDEDPMSolver,
    SDEDPMSolverPP,
    Solver,
    Tableau,
    Tsit5,
    UniPC,
)
from .terms import ProbabilityFlow, ReverseSDE, Term
from .units import Affine

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "DEIS",
    "PID",
    "RK4",
    "SDE",
    "SEEDS",
    "VESDE",
    "VPSDE",
    "Adams",
    "Affine",
    "BogackiShampine",
    "BrownianPath",
    "Controller",
    "CosineVPSDE",
    "DPMSolver",
    "DPMSolverPP",
    "Divergence",
    "Dopri5",
    "Dopri8",
    "Euler",
    "EulerMaruyama",
    "Exact",
    "FixedGrid",
    "Heun",
    "Hutchinson",
    "IndependentIncrements",
    "KarrasSDE",
    "LikelihoodFlow",
    "LogLikelihood",
    "LogSigmaLabel",
    "Midpoint",
    "Nats",
    "NetworkError",
    "Parameterization",
    "PartialResultWarning",
    "ProbabilityFlow",
    "RectifiedFlow",
    "ReverseSDE",
    "RungeKutta",
    "SASolver",
    "SDEDPMSolver",
    "SDEDPMSolverPP",
    "ScoreModel",
    "SdekitError",
    "SdekitWarning",
    "SigmaLabel",
    "SmoothnessWarning",
    "Solution",
    "SolveError",
    "Solver",
    "Stats",
    "Status",
    "SubVPSDE",
    "TableVPSDE",
    "Tableau",
    "Term",
    "TimeLabel",
    "ToleranceWarning",
    "Tsit5",
    "UniPC",
    "__version__",
    "data",
    "decode",
    "edm",
    "encode",
    "grid",
    "integrate",
    "log_likelihood",
    "noise",
    "sample",
    "score",
    "table_label",
    "targets",
    "v",
    "velocity",
]
