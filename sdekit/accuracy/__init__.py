"""How accurate a method is: observed orders, with what is known of their own error."""

from .order import Order, Reference, deterministic_order, half_log_snr_grids, order_of, reference_endpoint
from .stochastic import strong_order, weak_order

__all__ = [
    "Order",
    "Reference",
    "deterministic_order",
    "half_log_snr_grids",
    "order_of",
    "reference_endpoint",
    "strong_order",
    "weak_order",
]
