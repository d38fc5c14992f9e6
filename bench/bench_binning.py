"""Events of a batch to counts [T, B, C] on the device."""

import functools

import numpy as np
import torch

from bench import networks
from bench.subjects import Entry, Wrong
from gpn_triton.data.binning import BinningConfig, bin_batch
from gpn_triton.data.events import DeviceEvents
from gpn_triton.neurons.cost import Count

KIND = "binning"
# dense-frames: the whole set binned beforehand and kept dense on the host, a batch copied over, as
# a TensorDataset does; it pays in memory (T C 4 bytes a sample) and cannot augment
SUBJECTS = ("gpn-bin-batch", "numpy-bincount", "dense-frames")
SETS = 4


def bench_binning(contest, case, subject, device):
    T, B, C = case.T, case.B, case.inputs
    config = BinningConfig(time_bins=T, max_time=networks.SECONDS)

    def numpy_counts(store, samples) -> torch.Tensor:
        """Counts [B, T, C] float32 by numpy alone, sample by sample."""
        frames = np.zeros((B, T * C), np.float32)
        for row, k in zip(frames, samples, strict=True):
            span = slice(store.offsets[k], store.offsets[k + 1])
            bins = (store.times[span] * np.float32(T / networks.SECONDS)).astype(np.int64)
            cells = np.minimum(bins, T - 1) * C + store.units[span]
            row += np.bincount(cells, minlength=T * C)
        return torch.from_numpy(frames.reshape(B, T, C))

    @functools.cache
    def data():
        store = networks.event_store(SETS * B, C, case.classes)
        indices = torch.randperm(SETS * B, generator=torch.Generator().manual_seed(0))[:B]
        return store, indices, numpy_counts(store, indices.tolist()).transpose(0, 1)

    def prepare(name):
        store, indices, expected = data()
        if name == "gpn-bin-batch":
            call = functools.partial(
                bin_batch, DeviceEvents(store, device), indices.to(device), config
            )
        elif name == "numpy-bincount":

            def call():
                counts = numpy_counts(store, indices.tolist())
                return counts.transpose(0, 1).contiguous().to(device)

        else:
            starts = range(0, SETS * B, B)
            frames = torch.cat([numpy_counts(store, range(a, a + B)) for a in starts])

            def call():
                return frames[indices].to(device).transpose(0, 1)

        def check():
            if not torch.equal(call().cpu(), expected):
                raise Wrong("counts differ from numpy's")
            return {"events": B * networks.EVENTS}

        # times, units read, counts written
        work = Count(bytes=6.0 * B * networks.EVENTS + 4.0 * T * B * C)
        return Entry(call, check, work)

    contest(prepare, case, subject, mode="binning")
