from typing import Any, Self

from kvsig.planning._plan import Plan

class Packer:
    def __new__(cls, plan: Plan) -> Self: ...

def pieces(plan: Plan) -> list[tuple[str, Any]]: ...
