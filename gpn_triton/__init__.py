"""A Triton training engine for the Gated Parametric Neuron (arXiv 2412.01087)."""

from gpn_triton.machine import interrupt  # noqa: F401 - first, since what follows takes long
from gpn_triton.machine.provenance import VERSION
from gpn_triton.neurons.explain import explain
from gpn_triton.neurons.gpn import gpn
from gpn_triton.neurons.layers import GPN
from gpn_triton.neurons.networks import SpikingClassifier

__all__ = ["GPN", "SpikingClassifier", "explain", "gpn"]
__version__ = VERSION
