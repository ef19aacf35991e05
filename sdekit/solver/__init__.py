"""Solvers: values that propose one step."""

from .adams import Adams
from .base import Proposal, Solver
from .exponential import DDIM, DEIS, DPMSolverPP
from .exponential_sde import SEEDS, SDEDPMSolver, SDEDPMSolverPP
from .runge_kutta import RK4, BogackiShampine, Dopri5, Dopri8, Euler, Heun, Midpoint, RungeKutta, Tsit5
from .singlestep import DPMSolver
from .stochastic import EulerMaruyama
from .tableau import Tableau
from .unipc import SASolver, UniPC

__all__ = [
    "DDIM",
    "DEIS",
    "RK4",
    "SEEDS",
    "Adams",
    "BogackiShampine",
    "DPMSolver",
    "DPMSolverPP",
    "Dopri5",
    "Dopri8",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Midpoint",
    "Proposal",
    "RungeKutta",
    "SASolver",
    "SDEDPMSolver",
    "SDEDPMSolverPP",
    "Solver",
    "Tableau",
    "Tsit5",
    "UniPC",
]
