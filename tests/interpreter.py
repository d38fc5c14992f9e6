"""Whether Triton's interpreter can stand in for a GPU here."""

import pytest
import torch


def need_interpreter() -> None:
    """Skip the test, or the module that asks, with the reason, where no kernel can run."""
    triton = pytest.importorskip("triton")
    if torch.cuda.is_available():
        return
    import numpy

    triton_version, numpy_version = (
        tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy)
    )
    # arrays of one element no longer turn into numbers, which that interpreter asks of them
    if triton_version < (3, 7) and numpy_version >= (2, 4):
        pytest.skip(
            f"the interpreter of triton {triton.__version__} needs numpy below 2.4, and "
            f"{numpy.__version__} is here: `make compat` has such a set",
            allow_module_level=True,
        )
