"""Forward processes: alpha(t), sigma(t) and what follows from them."""

from .base import SDE
from .flow import RectifiedFlow
from .ve import VESDE, KarrasSDE
from .vp import VPSDE, CosineVPSDE, SubVPSDE, TableVPSDE

__all__ = ["SDE", "VESDE", "VPSDE", "CosineVPSDE", "KarrasSDE", "RectifiedFlow", "SubVPSDE", "TableVPSDE"]
