"""Networks kept in folders, and read from runs and from the authors' checkpoints.

    FOLDER/model.safetensors    the weights
    FOLDER/model.json           {"format": 1, "network": arguments of SpikingClassifier, ...}

Pretrained is the part of SpikingClassifier that knows of files. The authors published two
implementations, in January and in September 2023, of other sizes and with one layout of GPN:
fc1, sn1.ln, fc2 and so on, whose sn1.ln.weight [4 N, 2 N] has the columns of v, then those of x.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from gpn_triton.machine.files import read_json, write_atomically
from gpn_triton.neurons.gpn_options import check_choice
from gpn_triton.neurons.layers import GPN
from gpn_triton.neurons.reference import GATES
from gpn_triton.neurons.spike_linear import SpikeLinear

# raised when what the files of a folder hold changes
FORMAT = 1
WEIGHTS, ABOUT = "model.safetensors", "model.json"
# of a run's folder: its options and its best weights, which training.run_folder writes
RUN_OPTIONS, RUN_WEIGHTS = "config.json", "best.safetensors"
# options of a run that are arguments of its network
_OPTIONS = ("hidden", "neuron", "dropout", "readout", "time_bins", "surrogate", "alpha")
# arguments that change neither what a network is nor what it computes
_ASIDE = ("backend", "checkpoint_every", "time_constants")
_AUTHORS = {"gpn" if variant == "full" else f"gpn-{variant}": variant for variant in GATES}
Network = TypeVar("Network", bound="Pretrained")


class Pretrained(nn.Module):
    """A network that can be kept in a folder.

    Attributes:
        arguments: what it was made with, by name. neuron, inputs, neurons, output: as
            SpikingClassifier's.
    """

    arguments: dict[str, Any]
    neuron: str
    inputs: nn.ModuleList
    neurons: nn.ModuleList
    output: nn.Linear

    def save_pretrained(
        self, folder: str | os.PathLike, about: Mapping[str, Any] | None = None
    ) -> list[Path]:
        """Write the network into a folder, each file whole or not at all.

        Args:
            folder: made if missing; its files of these names are replaced.
            about: more values for model.json, such as class_names.
        Returns:
            the files written: the weights, and what they are of.
        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        network = {k: v for k, v in self.arguments.items() if k not in _ASIDE}
        text = json.dumps({"format": FORMAT, "network": network, **(about or {})}, indent=2) + "\n"
        save_weights(folder / WEIGHTS, self)
        write_atomically(folder / ABOUT, lambda file: file.write(text.encode()))
        return [folder / WEIGHTS, folder / ABOUT]

    @classmethod
    def from_pretrained(cls: type[Network], folder: str | os.PathLike) -> Network:
        """Read the network in a folder of save_pretrained or of python -m gpn_triton.export.

        Returns:
            the network, on the CPU and in evaluation mode.
        Raises:
            FileNotFoundError: no such folder or file. ValueError: a file that cannot be read.
        """
        about = read_json(Path(folder, ABOUT), "folder")
        if about.get("format") != FORMAT or not isinstance(about.get("network"), dict):
            raise ValueError(
                f"folder: {Path(folder, ABOUT)}: expected format {FORMAT} and a network, got "
                f"{about.get('format')!r}"
            )
        return cls._with(about["network"], Path(folder, WEIGHTS))

    @classmethod
    def from_run(cls: type[Network], run: str | os.PathLike) -> Network:
        """Read the network of a run of the training command, with its best weights.

        Args:
            run: the run's folder; of several seeds that of one, RUN/seed-K.
        Returns:
            the network, on the CPU and in evaluation mode.
        Raises:
            FileNotFoundError: no run, or one without a finished epoch. ValueError: a file that
                cannot be read, or the folder of several seeds.
        """
        run = Path(run)
        of_seed = run.name.startswith("seed-") and not (run / RUN_OPTIONS).exists()
        options = read_json((run.parent if of_seed else run) / RUN_OPTIONS, "run")
        path = run / RUN_WEIGHTS
        if not path.is_file() and (seeds := sorted(run.glob(f"seed-*/{RUN_WEIGHTS}"))):
            raise ValueError(f"run: {run} holds {len(seeds)} seeds: name one, as {seeds[0].parent}")
        tensors = _read_safetensors(path, "run")
        given = {name: options[name] for name in _OPTIONS if name in options}
        try:
            # of layers with products of their own the first weight is another
            first = next(t for name, t in tensors.items() if name in _FIRST)
            sizes = {"inputs": first.shape[1], "classes": len(tensors["output.weight"])}
        except (KeyError, StopIteration, IndexError):
            raise ValueError(f"run: {path}: expected a network's weights, got others") from None
        return cls._with({**given, **sizes}, path, tensors)

    @classmethod
    def from_authors(
        cls: type[Network], checkpoint: str | os.PathLike | Mapping[str, Tensor],
        neuron: str = "gpn", dropout: float = 0.5,
    ) -> Network:  # fmt: skip
        """Read a whole network of GPN from a checkpoint of either of the authors' implementations.

        Args:
            checkpoint: a file that they wrote with torch.save (checkpoint.pt, model_149.pt), one of
                safetensors (authors.safetensors of python -m gpn_triton.export), or its tensors by
                name. Files are read as data; nothing in them is executed.
            neuron: gpn, or the ablation that was trained, which the file does not say.
            dropout: for further training, which it does not say either: theirs was 0.5, and 0.25 in
                the wide networks.
        Returns:
            the network, on the CPU and in evaluation mode.
        Raises:
            FileNotFoundError: no such file. ValueError: another layout, or another neuron's.
        Source: the authors' two implementations of arXiv 2412.01087.
        """
        check_choice("neuron", neuron, _AUTHORS)
        if isinstance(checkpoint, Mapping):
            where, tensors = "checkpoint", dict(checkpoint)
        else:
            where, tensors = f"checkpoint: {checkpoint}", _read_checkpoint(Path(checkpoint))
        layers = sum(name.startswith("fc") and name.endswith(".weight") for name in tensors) - 1
        gates, expected = len(GATES[_AUTHORS[neuron]]), set()
        for k in range(1, layers + 2):
            expected |= {f"fc{k}.weight", f"fc{k}.bias"}
            if gates and k <= layers:
                expected |= {f"sn{k}.ln.weight", f"sn{k}.ln.bias"}
        if layers < 1 or expected != set(tensors):
            odd = sorted(expected ^ set(tensors))
            raise ValueError(
                f"{where}: expected fc1, sn1.ln, fc2 and so on, a network of {neuron}; too many or "
                f"missing: {', '.join(odd[:4]) or 'fc1.weight'}"
            )
        linears = [tensors[f"fc{k}.weight"] for k in range(1, layers + 2)]
        network: Any = cls(
            hidden=[len(w) for w in linears[:-1]], neuron=neuron, inputs=linears[0].shape[1],
            classes=len(linears[-1]), dropout=dropout,
        )  # fmt: skip
        try:
            for k, linear in enumerate([*network.inputs, network.output], 1):
                linear.load_state_dict({n: tensors[f"fc{k}.{n}"] for n in ("weight", "bias")})
                if gates and k <= layers:
                    ln = (tensors[f"sn{k}.ln.{name}"] for name in ("weight", "bias"))
                    network.neurons[k - 1].load_authors_weights(*ln)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{where}: layer {k}: {_reason(error)}") from None
        return network.eval()

    @classmethod
    def _with(
        cls: type[Network], arguments: dict[str, Any], path: Path,
        tensors: dict[str, Tensor] | None = None,
    ) -> Network:  # fmt: skip
        """The network of these arguments with the weights in a file, in evaluation mode."""
        tensors = _read_safetensors(path, "weights") if tensors is None else tensors
        quiet = any(name.endswith(".gain") for name in tensors) or None
        try:
            # the constants of a start that the weights replace
            network: Any = cls(**arguments, time_constants=quiet and (1.0, 1.0))
            network.load_state_dict(tensors)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"weights: {path} does not fit its network: {_reason(error)}"
            ) from None
        return network.eval()


_FIRST = ("inputs.0.weight", "neurons.0.weight_ih_l0", "neurons.0.convolution.weight")


def authors_weights(model: Pretrained) -> dict[str, Tensor]:
    """The weights of a GPN network of L hidden layers under the authors' names.

    Returns:
        fc1..fc{L + 1}.weight and .bias, the last one the readout; sn1..snL.ln.weight [G N, 2 N],
        columns of v, then of x, and .bias [G N], rows in the order f, i, b, theta. A layer of the
        variant no-fitb has no sn weights.
    Raises:
        ValueError: not a GPN network.
    Source: the authors' implementation of arXiv 2412.01087.
    """
    tensors = {}
    for k, linear in enumerate([*model.inputs, model.output], 1):
        if k <= len(model.neurons):
            neuron = model.neurons[k - 1]
            if not isinstance(neuron, GPN):
                raise ValueError(f"neuron: expected a GPN network, got {model.neuron}")
            if neuron.bias is not None:
                weight, bias = neuron.authors_weights()
                tensors |= {f"sn{k}.ln.weight": weight, f"sn{k}.ln.bias": bias}
        # a Linear that normalises its current is a Linear
        plain = cast(nn.Linear, linear)
        parameters = plain.weight, plain.bias
        weight, bias = linear.folded() if isinstance(linear, SpikeLinear) else parameters
        both = {f"fc{k}.weight": weight, f"fc{k}.bias": bias}
        tensors |= {name: t.detach() for name, t in both.items() if t is not None}
    return tensors


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model's parameters and buffers as safetensors."""
    tensors = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    write_atomically(path, lambda file: file.write(save(tensors)))


def load_weights(path: Path, model: nn.Module) -> None:
    """Read what save_weights wrote into a model of the same shape.

    Raises:
        FileNotFoundError: no such file. ValueError: not safetensors, or of another model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: no such file: {path}")
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"weights: {path} does not fit this network: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """An error in a line; the first of torch's several says only that there is one."""
    return str(error).strip().splitlines()[:2][-1].strip()


def _read_safetensors(path: Path, argument: str) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{argument}: no such file: {path}") from None
    except SafetensorError as error:
        raise ValueError(f"{argument}: {path} cannot be read: {error}") from None


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save or of safetensors."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path, "checkpoint")
    try:
        found = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"checkpoint: no such file: {path}") from None
    # what torch raises for a file that is cut, altered or no checkpoint of tensors at all
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read: {_reason(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"checkpoint: {path}: expected tensors by name")
    return found
