"""Train a network of GPN in a loop of one's own, on a file of events or on made ones.

python examples/plain_loop.py
python examples/plain_loop.py my_train.h5
"""

import sys

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, random_split

from gpn_triton import EventDataset, SpikingClassifier, read_events
from gpn_triton.data.loader import time_first
from gpn_triton.data.sources.synthetic import synthetic_splits

TIME_BINS = 25


def train(store, epochs=5, lr=5e-3, folder=None):
    """Train on nine tenths of a store; the share of right answers on the rest."""
    torch.manual_seed(0)
    train_set, valid_set = random_split(EventDataset(store, TIME_BINS), [0.9, 0.1])
    loader = DataLoader(train_set, 32, shuffle=True, collate_fn=time_first)
    model = SpikingClassifier(
        [128], inputs=store.num_channels, classes=len(store.class_names),
        time_constants=(0.5, TIME_BINS / 2),
    )  # fmt: skip
    # a quiet start normalises currents by the data, once
    some = [[counts] for counts, _ in loader]
    model.normalise(lambda: some)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for epoch in range(epochs):
        model.train()
        for counts, labels in loader:
            logits, _ = model(counts)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.eval()
    right = 0
    with torch.no_grad():
        for counts, labels in DataLoader(valid_set, 64, collate_fn=time_first):
            right += (model(counts)[0].argmax(1) == labels).sum().item()
    if folder is not None:
        model.save_pretrained(folder, {"class_names": store.class_names})
    return right / len(valid_set)


if __name__ == "__main__":
    store = read_events(sys.argv[1]) if sys.argv[1:] else synthetic_splits(2000).train
    print(f"{100 * train(store, folder='plain_loop'):.1f} % of the validation samples are right")
