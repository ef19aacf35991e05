"""Solvers: values that propose one step."""

from .adams import Adams
from .base import Proposal, Solver
from .edm import EDMChurn
from .exponential import DDIM, DEIS, DPMSolverPP
from .exponential_sde import SEEDS, SDEDPMSolver, SDEDPMSolverPP
from .langevin import MALA, AnnealedLangevin, BatchSNRLangevin, Langevin, SNRLangevin, Underdamped
from .predictor_corrector import Corrector, PredictorCorrector
from .runge_kutta import RK4, BogackiShampine, Dopri5, Dopri8, Euler, Heun, Midpoint, RungeKutta, Tsit5
from .singlestep import DPMSolver
from .sra import SRA1, SRA2, SRA3
from .stochastic import Ancestral, EulerMaruyama, ReverseDiffusion, StochasticHeun
from .tableau import Tableau
from .unipc import SASolver, UniPC

__all__ = [
    "DDIM",
    "DEIS",
    "MALA",
    "RK4",
    "SEEDS",
    "SRA1",
    "SRA2",
    "SRA3",
    "Adams",
    "Ancestral",
    "AnnealedLangevin",
    "BatchSNRLangevin",
    "BogackiShampine",
    "Corrector",
    "DPMSolver",
    "DPMSolverPP",
    "Dopri5",
    "Dopri8",
    "EDMChurn",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Langevin",
    "Midpoint",
    "PredictorCorrector",
    "Proposal",
    "ReverseDiffusion",
    "RungeKutta",
    "SASolver",
    "SDEDPMSolver",
    "SDEDPMSolverPP",
    "SNRLangevin",
    "Solver",
    "StochasticHeun",
    "Tableau",
    "Tsit5",
    "Underdamped",
    "UniPC",
]
