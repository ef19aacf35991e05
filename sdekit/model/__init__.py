"""Score models: a network, its SDE, and what its output means."""

from .parameterization import (
    LogSigmaLabel,
    Parameterization,
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
from .score_model import ScoreModel

__all__ = [
    "LogSigmaLabel",
    "Parameterization",
    "ScoreModel",
    "SigmaLabel",
    "TimeLabel",
    "data",
    "edm",
    "noise",
    "score",
    "table_label",
    "v",
    "velocity",
]
