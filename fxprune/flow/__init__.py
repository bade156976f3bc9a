"""Step `flow`: run the traced graph once more, on channel ids instead of numbers."""

from .run import Flow, Mixing
from .walk import Walk, flow

__all__ = ["Flow", "Mixing", "Walk", "flow"]
