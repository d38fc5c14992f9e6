"""What would fit where a training step does not: smaller parts are tried, not guessed."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gpn_triton.data.feed import Feed
    from gpn_triton.engine import Engine


def advice(engine: Engine, feed: Feed) -> str:
    """What a batch that did not fit needed, and what fits.

    Halves the parts of a batch until one goes through forward and backward. What the whole needed
    is a straight line through the peaks of that part and of its half: an estimate.

    Args:
        engine: after the error; its captures are given up, its weights stay. feed: its samples.
    Returns:
        one line.
    """
    device, size = engine.device, min(engine.cfg.batch_size, len(feed))
    parts = engine.cfg.accumulate
    while parts < size:
        parts = min(2 * parts, size)
        peak = _peak_bytes(engine, feed, -(-size // parts))
        if peak is not None:
            break
    else:
        return f"out of memory: not even one sample fits {device}: try a smaller --time-bins"
    part = -(-size // parts)
    needed = fits = ""
    if device.type == "cuda":
        half = max(part // 2, 1)
        slope = (peak - (_peak_bytes(engine, feed, half) or peak)) / max(part - half, 1)
        total = torch.cuda.get_device_properties(device).total_memory
        needed = f" needs about {_gib(peak + slope * (size - part))} of {device}'s {_gib(total)}"
        fits = f" with a peak of {_gib(peak)}"
    return (
        f"out of memory: a step of {size // engine.cfg.accumulate} samples at once{needed}; "
        f"--accumulate {parts}, {part} samples at once, fits{fits}; a smaller --batch-size or "
        "--checkpoint-every 10 need less too"
    )


def _peak_bytes(engine: Engine, feed: Feed, size: int) -> int | None:
    """Peak memory of forward and backward of so many samples (0 on a CPU); None: too much."""
    cuda = engine.device.type == "cuda"
    # a broken step is kept alive by its error's frames and by reference cycles
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(engine.device)
    if not engine.fits(feed, size):
        return None
    return torch.cuda.max_memory_allocated(engine.device) if cuda else 0


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
