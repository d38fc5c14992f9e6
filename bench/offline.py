"""Registers, spills, shared memory and instructions of the kernels of one layer, without a GPU.

python -m bench.offline --N 128 --dtype float16 --capability 90
"""

from __future__ import annotations

import argparse

import torch

from gpn_triton.kernels.offline import SHARED_BYTES, compile_layer
from gpn_triton.reference import GATES


def main() -> None:
    """Compile one layer for one GPU and print a line per kernel."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--N", type=int, default=128)
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--capability", type=int, default=90, choices=SHARED_BYTES)
    parser.add_argument("--variant", default="full", choices=GATES)
    parser.add_argument("--B", type=int, default=256)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--mean", action="store_true")
    parser.add_argument("--precision", default="ieee", choices=["ieee", "tf32"])
    options = vars(parser.parse_args())
    options["dtype"] = getattr(torch, options["dtype"])
    options["gates"] = GATES[options.pop("variant")]
    plan, reports = compile_layer(**options)
    print(plan)
    for report in reports:
        print(report)


if __name__ == "__main__":
    main()
