"""Device work run as it is, or captured once as a CUDA graph and replayed from then on."""

from collections import Counter
from collections.abc import Callable, Hashable

import torch

from gpn_triton.machine.device import is_out_of_memory

# runs before a capture: the first compiles kernels and lets libraries and the optimiser make what
# they keep, the second finds all of it made
WARM_RUNS = 2


class Graphs:
    """Runs pieces of work on a device, each known by a key.

    With graphs, a piece is run as it is WARM_RUNS times, then captured and from then on replayed.
    Every run and replay counts: nothing is done for the capture's sake or undone after it.

    A piece is device work alone: it neither waits for the device nor brings numbers from the host,
    and writes what outlives it into tensors that were there before. Random numbers come from the
    device's default generator, which a replay moves on as a run does.

    Args:
        device: where the work happens. enabled: capture, which needs a CUDA device.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self.device, self.enabled = device, enabled
        self._runs: Counter[Hashable] = Counter()
        self._replays: dict[Hashable, Callable[[], object]] = {}
        if enabled and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            # one pool for all graphs: none reads what another left there, and none runs beside it
            self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do a piece of work; its key is the same for the same work on the same tensors.

        Raises:
            RuntimeError: it cannot be captured.
        """
        if not self.enabled:
            work()
        elif self._runs[key] < WARM_RUNS:
            self._runs[key] += 1
            self._warm(work)
        else:
            if key not in self._replays:
                self._replays[key] = self._capture(work)
            self._replays[key]()

    def _warm(self, work: Callable[[], None]) -> None:
        # on the stream of the capture, whose memory the libraries' workspaces then are
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def _capture(self, work: Callable[[], None]) -> Callable[[], object]:
        graph, first = torch.cuda.CUDAGraph(), None
        # torch's capture does not give the current stream back where its end fails
        current = torch.cuda.current_stream(self.device)
        try:
            # other threads may go on copying meanwhile
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(
                    graph, self._pool, self._stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    work()
                except BaseException as error:
                    first = error
                    raise
        except BaseException as error:
            # the end of a broken capture raises an error of its own, which says less than the first
            error = first or error
            if not isinstance(error, RuntimeError) or is_out_of_memory(error):
                raise error from None
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"the step cannot become a CUDA graph: {reason}; --no-graph runs it as it is"
            ) from error
        return graph.replay
