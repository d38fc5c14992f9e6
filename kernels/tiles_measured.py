"""Tiles that a GPU ran faster than those that tiles.py reckons: of the full neuron, in half types.

`python -m bench.tuning_record RECORD.json --write` makes this file of a record; none has been made
yet.
"""

# (compute capability, strategy, neurons, way): from which batch on, and the tile's fields
MEASURED: dict[tuple[int, str, int, str], dict[int, tuple]] = {}


def fastest(capability: int, strategy: str, N: int, way: str, B: int) -> tuple | None:
    """The fields of the tile that was measured at the largest batch up to B, or None.

    Args:
        capability: 10 x major + minor. strategy: persistent or stepwise. way: forward or backward.
        N, B: neurons, batch.
    """
    found = MEASURED.get((capability, strategy, N, way), {})
    batches = [batch for batch in found if batch <= B]
    return found[max(batches)] if batches else None
