"""Solvers: values that propose one step."""

from .adams import Adams
from .base import Proposal, Solver
from .exponential import DPMSolverPP
from .runge_kutta import RK4, BogackiShampine, Dopri5, Dopri8, Euler, Heun, Midpoint, RungeKutta, Tsit5
from .stochastic import EulerMaruyama
from .tableau import Tableau

__all__ = [
    "RK4",
    "Adams",
    "BogackiShampine",
    "DPMSolverPP",
    "Dopri5",
    "Dopri8",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Midpoint",
    "Proposal",
    "RungeKutta",
    "Solver",
    "Tableau",
    "Tsit5",
]
