"""Tag every word of sentences of different lengths: a switch that one word sets and another resets.

The form of PyTorch's tutorials: words are embedded, packed, read by a recurrent layer and tagged.
tagger_lstm.py and tagger_gpn.py differ in three lines.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence

from gpn_triton import GPN

WORDS, SET, RESET = 8, 0, 1


class Tagger(nn.Module):
    def __init__(self, embedding=16, hidden=32):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, embedding)
        self.layer = GPN(embedding, hidden, num_layers=2)
        self.output = nn.Linear(hidden, 2)

    def forward(self, sentences):
        packed = pack_sequence([self.embedding(s) for s in sentences], enforce_sorted=False)
        packed, h = self.layer(packed)
        padded, lengths = pad_packed_sequence(packed)
        return self.output(padded), lengths, h


def make_sentences(count):
    """Sentences of 4 to 20 words, and what the switch is after each word."""
    sentences, tags = [], []
    for length in torch.randint(4, 21, (count,)).tolist():
        words, on = torch.randint(WORDS, (length,)), []
        for word in words.tolist():
            on.append(word == SET or (word != RESET and bool(on) and on[-1]))
        sentences.append(words)
        tags.append(torch.tensor(on).long())
    return sentences, tags


def train(steps=100, batch=32):
    """Train a tagger; the share of right tags of new sentences."""
    torch.manual_seed(0)
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        sentences, tags = make_sentences(batch)
        logits, _, _ = model(sentences)
        # padding has the tag that the loss leaves out
        loss = F.cross_entropy(
            logits.flatten(0, 1), pad_sequence(tags, padding_value=-100).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    sentences, tags = make_sentences(500)
    found = model(sentences)[0].argmax(2).t()
    return (
        torch.cat([f[: len(t)] == t for f, t in zip(found, tags, strict=True)])
        .float()
        .mean()
        .item()
    )


if __name__ == "__main__":
    print(f"{100 * train():.1f} % of the tags are right")
