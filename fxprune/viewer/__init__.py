"""The viewer: a dump as one HTML file, with the graph and its channel groups at every step."""

from __future__ import annotations

from .page import view

__all__ = ["view"]
