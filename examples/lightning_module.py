"""Train a network of GPN with Lightning (the extra lightning), on a file of events or on made ones.

python examples/lightning_module.py
python examples/lightning_module.py my_train.h5
"""

import sys

import lightning
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from gpn_triton import EventDataset, SpikingClassifier, read_events
from gpn_triton.data.loader import time_first
from gpn_triton.data.sources.synthetic import synthetic_splits


class Classifier(lightning.LightningModule):
    def __init__(self, **network):
        super().__init__()
        self.network = SpikingClassifier(**network)

    def training_step(self, batch, _):
        return F.cross_entropy(self.network(batch[0])[0], batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def train(store, epochs=5, **trainer):
    """Train on a store; the module."""
    data = EventDataset(store, time_bins=25)
    loader = DataLoader(data, 32, shuffle=True, collate_fn=time_first)
    module = Classifier(
        hidden=[128], inputs=store.num_channels, classes=len(store.class_names)
    )  # fmt: skip
    lightning.Trainer(max_epochs=epochs, **trainer).fit(module, loader)
    return module


if __name__ == "__main__":
    store = read_events(sys.argv[1]) if sys.argv[1:] else synthetic_splits(2000).train
    train(store).network.save_pretrained("lightning_module")
