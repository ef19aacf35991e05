"""sdekit: diffusion models evaluated, not only sampled.

A continuous-time SDE/ODE toolkit in PyTorch: log-likelihoods with an error bar and an error estimate, reverse-SDE and
probability-flow solvers, exact targets to measure them against.
"""

from . import grid, targets
from .bounds import Estimate, VariationalBound, sde_bound, variational_bound
from .brownian import BrownianPath, IndependentIncrements
from .brownian_motion import BrownianMotion
from .budget import Budget
from .captured import keep_graphs
from .checkup import Checkup, check_model
from .chunking import chunked
from .comparison import LogRatio, MeanRatio, log_ratio
from .controller import Controller, FixedGrid, Nats
from .dequantize import Dequantizer, TruncatedNormalDequantizer, UniformDequantizer, VariationalDequantizer
from .discrete import discrete_log_likelihood
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
from .gradient import log_prob
from .integrate import integrate
from .ito import ItoDensity, ito_log_density
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
from .model.guidance import GuidanceInterval, classifier_guided, guided
from .pid import PID
from .plan import Plan, plan_sampling
from .pointwise import i_mmse, path_integral
from .sampled_density import SampledDensity, sample_log_prob
from .sampler_density import SamplerDensity, sampler_log_density
from .sampling import decode, encode, sample
from .sandwich import Sandwich, sandwich
from .sde import SDE, VESDE, VPSDE, CosineVPSDE, KarrasSDE, RectifiedFlow, SubVPSDE, TableVPSDE
from .solution import DiscreteLogLikelihood, LogLikelihood, Solution, Stats, Status
from .solver import (
    DDIM,
    DEIS,
    MALA,
    RK4,
    SEEDS,
    SRA1,
    SRA2,
    SRA3,
    Adams,
    Ancestral,
    AnnealedLangevin,
    BatchSNRLangevin,
    BogackiShampine,
    Corrector,
    Dopri5,
    Dopri8,
    DPMSolver,
    DPMSolverPP,
    EDMChurn,
    Euler,
    EulerMaruyama,
    Heun,
    Langevin,
    Midpoint,
    PredictorCorrector,
    ReverseDiffusion,
    RungeKutta,
    SASolver,
    SDEDPMSolver,
    SDEDPMSolverPP,
    SNRLangevin,
    Solver,
    StochasticHeun,
    Tableau,
    Tsit5,
    Underdamped,
    UniPC,
)
from .terms import ProbabilityFlow, ReverseSDE, Term
from .units import Affine, require_dequantized

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "DEIS",
    "MALA",
    "PID",
    "RK4",
    "SDE",
    "SEEDS",
    "SRA1",
    "SRA2",
    "SRA3",
    "VESDE",
    "VPSDE",
    "Adams",
    "Affine",
    "Ancestral",
    "AnnealedLangevin",
    "BatchSNRLangevin",
    "BogackiShampine",
    "BrownianMotion",
    "BrownianPath",
    "Budget",
    "Checkup",
    "Controller",
    "Corrector",
    "CosineVPSDE",
    "DPMSolver",
    "DPMSolverPP",
    "Dequantizer",
    "DiscreteLogLikelihood",
    "Divergence",
    "Dopri5",
    "Dopri8",
    "EDMChurn",
    "Estimate",
    "Euler",
    "EulerMaruyama",
    "Exact",
    "FixedGrid",
    "GuidanceInterval",
    "Heun",
    "Hutchinson",
    "IndependentIncrements",
    "ItoDensity",
    "KarrasSDE",
    "Langevin",
    "LikelihoodFlow",
    "LogLikelihood",
    "LogRatio",
    "LogSigmaLabel",
    "MeanRatio",
    "Midpoint",
    "Nats",
    "NetworkError",
    "Parameterization",
    "PartialResultWarning",
    "Plan",
    "PredictorCorrector",
    "ProbabilityFlow",
    "RectifiedFlow",
    "ReverseDiffusion",
    "ReverseSDE",
    "RungeKutta",
    "SASolver",
    "SDEDPMSolver",
    "SDEDPMSolverPP",
    "SNRLangevin",
    "SampledDensity",
    "SamplerDensity",
    "Sandwich",
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
    "StochasticHeun",
    "SubVPSDE",
    "TableVPSDE",
    "Tableau",
    "Term",
    "TimeLabel",
    "ToleranceWarning",
    "TruncatedNormalDequantizer",
    "Tsit5",
    "Underdamped",
    "UniPC",
    "UniformDequantizer",
    "VariationalBound",
    "VariationalDequantizer",
    "__version__",
    "check_model",
    "chunked",
    "classifier_guided",
    "data",
    "decode",
    "discrete_log_likelihood",
    "edm",
    "encode",
    "grid",
    "guided",
    "i_mmse",
    "integrate",
    "ito_log_density",
    "keep_graphs",
    "log_likelihood",
    "log_prob",
    "log_ratio",
    "noise",
    "path_integral",
    "plan_sampling",
    "require_dequantized",
    "sample",
    "sample_log_prob",
    "sampler_log_density",
    "sandwich",
    "score",
    "sde_bound",
    "table_label",
    "targets",
    "v",
    "variational_bound",
    "velocity",
]
