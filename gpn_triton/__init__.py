"""A Triton training engine for the Gated Parametric Neuron (arXiv 2412.01087)."""

from gpn_triton.explain import explain
from gpn_triton.layers import GPN
from gpn_triton.model import SpikingClassifier
from gpn_triton.ops import gpn
from gpn_triton.provenance import VERSION

__all__ = ["GPN", "SpikingClassifier", "explain", "gpn"]
__version__ = VERSION
