"""Other people's trainers around the network; each test needs its package, and skips without it."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gpn_triton import SpikingClassifier


def data(samples=48, T=6, C=20):
    """Counts [S, T, C] of two classes that fire in different channels, and labels [S]."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % 2
    x = torch.poisson(torch.full((samples, T, C), 0.2), generator=draw)
    x[labels == 1, :, : C // 2] += 1
    return x, labels


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


def test_lightning_trains_resumes_and_mixes_precision(lightning, tmp_path):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = SpikingClassifier([16, 8], inputs=20, classes=2, dropout=0.1)

        def training_step(self, batch, _):
            x, labels = batch
            loss = F.cross_entropy(self.net(x.transpose(0, 1))[0].float(), labels)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    def trainer(epochs, precision="32-true"):
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", precision=precision, logger=False,
            enable_progress_bar=False, default_root_dir=tmp_path, enable_model_summary=False,
        )  # fmt: skip

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=16)
    torch.manual_seed(0)
    whole = Module()
    first = {k: v.clone() for k, v in whole.state_dict().items()}
    run = trainer(2)
    run.fit(whole, loader)
    assert any(not torch.equal(v, first[k]) for k, v in whole.state_dict().items())
    run.save_checkpoint(tmp_path / "two.ckpt")
    again = Module()
    trainer(3).fit(again, loader, ckpt_path=tmp_path / "two.ckpt")
    assert all(p.isfinite().all() for p in again.parameters())
    for precision in ("bf16-mixed", "bf16-true"):
        if precision == "bf16-true":
            loader = torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(data()[0].bfloat16(), data()[1]), batch_size=16
            )
        module = Module()
        trainer(1, precision).fit(module, loader)
        assert all(p.isfinite().all() for p in module.parameters())


def test_skorch_fits_and_predicts():
    skorch = pytest.importorskip("skorch")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = SpikingClassifier([16], inputs=20, classes=2, dropout=0.0)

        def forward(self, x):
            return self.net(x.transpose(0, 1))[0]

    torch.manual_seed(0)
    x, labels = data()
    classifier = skorch.NeuralNetClassifier(
        Logits, criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.Adam, lr=0.02,
        max_epochs=20, batch_size=16, train_split=None, verbose=0,
    )  # fmt: skip
    classifier.fit(x, labels)
    assert np.mean(classifier.predict(x) == labels.numpy()) > 0.9
