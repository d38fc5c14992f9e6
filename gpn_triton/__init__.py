"""A Triton training engine for the Gated Parametric Neuron (arXiv 2412.01087)."""

__version__ = "0.1.0"
