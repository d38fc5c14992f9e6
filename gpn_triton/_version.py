"""The project's version, which needs no import of anything else."""

__version__ = "0.1.0"
