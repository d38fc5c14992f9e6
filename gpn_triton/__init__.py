"""A Triton training engine for the Gated Parametric Neuron (arXiv 2412.01087)."""

from typing import TYPE_CHECKING, Any

from gpn_triton.machine import interrupt  # noqa: F401 - first, since what follows takes long
from gpn_triton.machine.provenance import VERSION
from gpn_triton.neurons.explain import explain
from gpn_triton.neurons.gpn import gpn
from gpn_triton.neurons.layers import GPN
from gpn_triton.neurons.networks import SpikingClassifier

if TYPE_CHECKING:
    from gpn_triton.data.events import EventStore
    from gpn_triton.data.loader import EventDataset
    from gpn_triton.data.sources.hdf5 import read_events, write_events

__all__ = [
    "GPN", "EventDataset", "EventStore", "SpikingClassifier", "explain", "gpn", "read_events",
    "write_events",
]  # fmt: skip
__version__ = VERSION
# imported when they are first asked for, since who wants the layer alone needs no HDF5
_LATER = {
    "EventStore": "data.events",
    "EventDataset": "data.loader",
    "read_events": "data.sources.hdf5",
    "write_events": "data.sources.hdf5",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"gpn_triton.{_LATER[name]}"), name)
