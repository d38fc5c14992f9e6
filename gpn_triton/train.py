"""Train a spiking network on events, choose the best epoch by validation and test it once.

python -m gpn_triton.train --amp
python -m gpn_triton.train --amp --preset shd-small --download
python -m gpn_triton.train --train-file my_train.h5 --test-file my_test.h5 --seed 1 2 3
python -m gpn_triton.train --dataset recordings/
python -m gpn_triton.train --resume auto
"""

import dataclasses
import sys
from pathlib import Path

from gpn_triton.audio.encoding import prepare
from gpn_triton.machine import interrupt
from gpn_triton.machine.command import Interrupted
from gpn_triton.machine.device import choose_device, memory_named
from gpn_triton.training import parser
from gpn_triton.training.engine import NonFiniteError
from gpn_triton.training.experiment import run_experiment
from gpn_triton.training.options import TrainConfig


def _with_recordings(cfg: TrainConfig) -> TrainConfig:
    """The configuration with the files made of --dataset FOLDER, where it names one.

    They are what a run remembers: it goes on without the recordings.
    """
    if cfg.train_file is not None or not Path(cfg.dataset).is_dir():
        return cfg
    files = prepare(cfg.dataset, cfg.cache_dir, choose_device(cfg.device))
    if "train" not in files:
        raise ValueError(f"dataset: expected training recordings in {cfg.dataset}, found none")
    names = {f"{part}_file": str(path) for part, path in files.items()}
    return dataclasses.replace(cfg, **names)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        interrupt.started()
        # memory may also not suffice before or after the training
        with memory_named():
            run_experiment(_with_recordings(parser.parse(argv)))
        return 0
    except (ValueError, OSError, MemoryError, NonFiniteError) as error:
        # a user's mistake or the machine's is named where it was found
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        return 128 + stop.signal
    except KeyboardInterrupt as stop:
        print(f"stopped at once: {str(stop) or 'nothing was begun'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
