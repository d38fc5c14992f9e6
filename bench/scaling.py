"""What travels between processes in a training step, and what it should cost: computed, not run.

python -m bench.scaling        the table of docs/scaling.md
"""

from __future__ import annotations

from bench.report import markdown
from gpn_triton import SpikingClassifier

# hidden layers, classes, and the estimated time of a step of 256 samples a process on an H100 in
# bfloat16 (SHD T = 100, SSC T = 50; from machine code and stated latencies, within 30 %), seconds
NETWORKS = {
    "SHD": ((128,), 20, 0.6e-3),
    "SSC": ((512, 256, 128), 35, 2.1e-3),
}
# processes, the link that a ring of them is bound by: bytes/s in one direction, and seconds from
# one to the next. NVLink 4 and InfiniBand NDR as their makers state the rate; the latencies are
# assumed
LINKS = {
    8: ("NVLink 4, one machine", 450e9, 2e-6),
    64: ("InfiniBand NDR, 8 machines", 50e9, 5e-6),
}


def step_bytes(hidden: tuple[int, ...], classes: int) -> int:
    """Bytes of the one buffer that is added up: float32 gradients, and the loss."""
    model = SpikingClassifier(hidden, classes=classes)
    return 4 * (sum(p.numel() for p in model.parameters()) + 1)


def ring_seconds(size: int, processes: int, bytes_per_s: float, latency: float) -> float:
    """Time of an all-reduce round a ring: every process passes on 2 (n - 1) / n of the buffer."""
    hops = 2 * (processes - 1)
    return hops / processes * size / bytes_per_s + hops * latency


def table() -> str:
    """A row for each network and number of processes."""
    rows = []
    for name, (hidden, classes, step) in NETWORKS.items():
        size = step_bytes(hidden, classes)
        for processes, (link, rate, latency) in LINKS.items():
            seconds = ring_seconds(size, processes, rate, latency)
            rows.append({
                "network": f"{name} 700-{'-'.join(map(str, hidden))}-{classes}",
                "MB a step": f"{size / 1e6:.2f}",
                "processes": processes,
                "link": link,
                "step, us (estimated)": f"{1e6 * step:.0f}",
                "adding up, us (computed)": f"{1e6 * seconds:.0f}",
                "efficiency (computed)": f"{step / (step + seconds):.0%}",
            })  # fmt: skip
    return markdown(rows[0], (row.values() for row in rows), 1)


if __name__ == "__main__":
    print(table())
