"""The planner: page numbers and a geometry in, the cheapest set of copies out.

A plan is a pure function of geometry, page numbers, direction and settings: there is no clock, no
CUDA, no torch and no memory of earlier transfers in here.
"""

from __future__ import annotations

from kvsig.planning._pack import pieces
from kvsig.planning._plan import Direction, Geometry, Pages
from kvsig.planning.explain import Plan
from kvsig.planning.geometry import Planes

__all__ = ["Direction", "Geometry", "Pages", "Plan", "Planes", "pieces"]
