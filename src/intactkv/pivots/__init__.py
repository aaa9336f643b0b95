"""Where a model's pivots are, what they carry of a quantized model's error, and which prefix keeps them intact."""

from intactkv.pivots.classify import Diagnosis, Pivot, Sink, diagnose, without_pivot
from intactkv.pivots.discover import Trial, discover
from intactkv.pivots.measure import LayerPivot, PivotMap, first_token_pivots, measure, uniform_mass
from intactkv.pivots.pair import LayerBudget, error_budget, mse_by_prefix_size

__all__ = [
    "Diagnosis",
    "LayerBudget",
    "LayerPivot",
    "Pivot",
    "PivotMap",
    "Sink",
    "Trial",
    "diagnose",
    "discover",
    "error_budget",
    "first_token_pivots",
    "measure",
    "mse_by_prefix_size",
    "uniform_mass",
    "without_pivot",
]
