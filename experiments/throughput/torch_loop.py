"""The incumbent that the throughput benchmark compares with: the same host and seeds, trained by a plain PyTorch loop.

    python -m experiments.throughput.torch_loop '{"threads": 2, ...}'      (see `Settings` and `TextSettings`)

A process of its own, so that two of them can run side by side and measurements can alternate with other programs: it
prints `ready`, then, for each line that it reads (`train` or `epoch`), how many seconds that work took. One environment
after the other, eager calls, no compiler: the way such systems are usually written. Only this file imports torch, which
is not a dependency of the project.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

ALPHA = 0.5  # of the seeds, in the middle of their blend


@dataclass
class Settings:
    threads: int
    device: str  # cpu or cuda
    widths: list[int]  # channels after each block; every block pools
    image_size: int
    channels: int
    train_images: int
    validation_images: int
    batch_size: int
    train_batches: int  # of the work `train`: bare host
    epoch_batches: int  # of the work `epoch`: one environment with a conv_light in every slot, and its evaluation
    seeds: bool  # whether `epoch` will be asked for


@dataclass
class TextSettings:
    threads: int
    device: str
    vocabulary: int
    width: int
    heads: int
    layers: int
    length: int  # tokens of a sequence
    batch_size: int  # sequences
    train_batches: int


class Block(nn.Module):
    def __init__(self, c: int, o: int):
        super().__init__()
        self.conv = nn.Conv2d(c, o, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(o)

    def forward(self, x):
        return F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)


class ConvLight(nn.Module):
    """x + relu(GroupNorm(conv(x)))."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1, bias=False)
        fits = [g for g in (32, 16, 8, 4, 2, 1) if c % g == 0]
        self.norm = nn.GroupNorm(next((g for g in fits if c // g >= 16), fits[0]), c)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


class Network(nn.Module):
    """The host, with a seed blended into its features after every block if there are seeds."""

    def __init__(self, settings: Settings, seeds: bool):
        super().__init__()
        widths = settings.widths
        self.blocks = nn.ModuleList(Block(c, o) for c, o in zip([settings.channels, *widths], widths, strict=False))
        self.seeds = nn.ModuleList(ConvLight(w) for w in widths) if seeds else None
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x, alpha=None):
        """`alpha`: per slot a number, or `[images, 1, 1, 1]`."""
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.seeds is not None:
                x = x + alpha[i] * (self.seeds[i](x) - x)
        return self.head(x.mean((2, 3)))


class Incumbent:
    def __init__(self, settings: Settings):
        self.settings, self.device = settings, torch.device(settings.device)
        make = lambda n: torch.randint(0, 256, (n, settings.channels, settings.image_size, settings.image_size))
        self.images = make(settings.train_images).to(torch.uint8).to(self.device)
        self.labels = torch.randint(0, 10, (settings.train_images,), device=self.device)
        self.validation = make(settings.validation_images).to(torch.uint8).to(self.device)
        self.validation_labels = torch.randint(0, 10, (settings.validation_images,), device=self.device)
        self.bare = self._learner(seeds=False)
        self.grown = self._learner(seeds=True) if settings.seeds else None

    def _learner(self, seeds: bool):
        network = Network(self.settings, seeds).to(self.device)
        host = [p for name, p in network.named_parameters() if not name.startswith("seeds")]
        groups = [host, *([list(seed.parameters()) for seed in network.seeds] if seeds else [])]
        optimisers = [torch.optim.SGD(host, lr=0.01, momentum=0.9, weight_decay=5e-4)]
        optimisers += [torch.optim.SGD(group, lr=0.01, momentum=0.9) for group in groups[1:]]
        return network, groups, optimisers

    def _normalise(self, images):
        return images.float().div_(255).sub_(0.5).div_(0.25)

    def _augment(self, images):
        """Random flip, pad by an eighth, random window, for every image on its own."""
        n, c, size, _ = images.shape
        pad = size // 8
        flip = torch.rand(n, 1, 1, 1, device=images.device) < 0.5
        images = F.pad(torch.where(flip, images.flip(3), images), (pad, pad, pad, pad))
        offset = torch.randint(0, 2 * pad + 1, (2, n, 1), device=images.device)
        line = torch.arange(size, device=images.device)
        rows, columns = (offset[0] + line)[:, None, :, None], (offset[1] + line)[:, None, None, :]
        number = torch.arange(n, device=images.device)[:, None, None, None]
        return images[number, torch.arange(c, device=images.device)[None, :, None, None], rows, columns]

    def _train(self, learner, batches: int, augment: bool, alpha=None):
        network, groups, optimisers = learner
        network.train()
        order = torch.randperm(len(self.images), device=self.device)
        size = self.settings.batch_size
        loss_sum = correct = 0
        for start in range(0, batches * size, size):
            index = order[torch.arange(start, start + size, device=self.device) % len(order)]
            images, labels = self.images[index], self.labels[index]
            x = self._normalise(self._augment(images) if augment else images)
            for optimiser in optimisers:
                optimiser.zero_grad()
            logits = network(x, alpha)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            for group, optimiser in zip(groups, optimisers, strict=True):
                torch.nn.utils.clip_grad_norm_(group, 1.0)
                optimiser.step()
            loss_sum += loss.detach()
            correct += (logits.argmax(1) == labels).sum()
        return float(loss_sum), float(correct)

    @torch.no_grad()
    def _evaluate(self, learner):
        """Main, leave-one-out, all-off and the pairs (all 2^S for three slots), by repeating the batch."""
        network = learner[0].eval()
        slots = len(self.settings.widths)
        patterns = torch.tensor([[k >> s & 1 for s in range(slots)] for k in range(2**slots)], device=self.device)
        correct = torch.zeros(len(patterns), device=self.device)
        batches = zip(
            self.validation.split(self.settings.batch_size),
            self.validation_labels.split(self.settings.batch_size),
            strict=True,
        )
        for images, labels in batches:
            x = self._normalise(images).repeat(len(patterns), 1, 1, 1)
            alpha = ALPHA * patterns.T.repeat_interleave(len(images), 1)[:, :, None, None, None]
            right = network(x, alpha).argmax(1).view(len(patterns), -1) == labels
            correct += right.sum(1)
        return correct.tolist()

    def work(self, name: str) -> None:
        if name == "train":
            self._train(self.bare, self.settings.train_batches, augment=False)
        else:
            self._train(
                self.grown, self.settings.epoch_batches, augment=True, alpha=[ALPHA] * len(self.settings.widths)
            )
            self._evaluate(self.grown)


class Layer(nn.Module):
    """A layer of a pre-norm decoder."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h):
        n, length, width = h.shape
        split = lambda x: x.view(n, length, self.heads, width // self.heads).transpose(1, 2)
        q, k, v = map(split, self.qkv(self.attention_norm(h)).chunk(3, dim=-1))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, length, width)
        h = h + self.attention_out(heads)
        return h + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(h))))


class Decoder(nn.Module):
    def __init__(self, settings: TextSettings):
        super().__init__()
        self.tokens = nn.Embedding(settings.vocabulary, settings.width)
        self.positions = nn.Embedding(settings.length, settings.width)
        nn.init.normal_(self.tokens.weight, 0, 0.02)
        self.layers = nn.ModuleList(Layer(settings.width, settings.heads) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width)

    def forward(self, x):
        h = self.tokens(x) + self.positions.weight
        for layer in self.layers:
            h = layer(h)
        return F.linear(self.norm(h), self.tokens.weight)


class TextIncumbent:
    def __init__(self, settings: TextSettings):
        self.settings, self.device = settings, torch.device(settings.device)
        self.text = torch.randint(0, settings.vocabulary, (100_000,), device=self.device)
        self.network = Decoder(settings).to(self.device)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=5e-4)

    def work(self, name: str) -> None:
        """`train`, the only work there is."""
        length, batch = self.settings.length, self.settings.batch_size
        line = torch.arange(length + 1, device=self.device)
        loss_sum = correct = 0
        for _ in range(self.settings.train_batches):
            starts = torch.randint(0, len(self.text) - length, (batch, 1), device=self.device)
            windows = self.text[starts + line]
            x, labels = windows[:, :-1], windows[:, 1:]
            self.optimiser.zero_grad()
            logits = self.network(x)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimiser.step()
            loss_sum += loss.detach()
            correct += (logits.argmax(-1) == labels).sum()
        float(loss_sum), float(correct)


def main() -> None:
    given = json.loads(sys.argv[1])
    settings = (TextSettings if "vocabulary" in given else Settings)(**given)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    incumbent = (TextIncumbent if "vocabulary" in given else Incumbent)(settings)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        incumbent.work(line.strip())
        if settings.device == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
