"""A Triton training engine for the Gated Parametric Neuron (arXiv 2412.01087)."""

from gpn_triton._version import __version__ as __version__
from gpn_triton.layers import GPN
from gpn_triton.model import SpikingClassifier
from gpn_triton.ops import gpn

__all__ = ["GPN", "SpikingClassifier", "gpn"]
