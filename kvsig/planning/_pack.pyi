from typing import Any

from kvsig.planning._plan import Plan

DEFAULT_PIECE: int

def pieces(plan: Plan) -> list[tuple[str, Any]]: ...
