"""The plain PyTorch side of `stage2.py`: the same transformer, with a static cache.

    python benchmarks/stage2_torch.py sampling T BATCH [VARIANT ...]
    python benchmarks/stage2_torch.py training T [VARIANT ...]

Prints a JSON object for each measurement. A variant is, for example, "float32, compiled"; by
default, all variants are measured.
"""

import itertools
import sys

import measuring
import stage2_work as work
import torch
import torch.nn.functional as F
from torch import nn

MODES = ("eager", "compiled")


class Block(nn.Module):
    """A block of `prior/block.py`, layer by layer."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        hidden = work.hidden(width)
        self.shape = heads, width // heads
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def heads(self, x, rotation):
        """Returns rotated queries, rotated keys and values [B, H, N, D] of x [B, N, width]."""
        qkv = self.qkv(self.attention_norm(x))
        qkv = qkv.view(*x.shape[:2], 3, *self.shape).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return rotate(query, *rotation), rotate(key, *rotation), value

    def add(self, x, attended):
        """Returns x plus the outputs of attention [B, H, N, D] and of the feed-forward layer."""
        x = x + self.dropout(self.attention_output(attended.transpose(1, 2).flatten(2)))
        gate, up = self.gate_and_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))

    def forward(self, x, rotation):
        """Maps whole sequences [B, T, width] to the same shape."""
        query, key, value = self.heads(x, rotation)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.add(x, attended)


def rotate(x, cos, sin):
    """Rotates the two halves of each head."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Prior(nn.Module):
    """The transformer of `prior/transformer.py`."""

    def __init__(
        self,
        length,
        num_codes,
        layers=work.LAYERS,
        width=work.WIDTH,
        heads=work.HEADS,
        dropout=0.0,
    ):
        super().__init__()
        self.length = length
        self.labels = nn.Embedding(work.LABELS + 1, width)
        self.codes = nn.Embedding(num_codes, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, num_codes, bias=False)
        frequencies = 100 ** -torch.linspace(0, 1, width // heads // 2)
        angles = torch.outer(torch.arange(length), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, codes, labels):
        """Returns the loss of codes [B, T] given labels [B]."""
        x = torch.cat([self.labels(labels)[:, None], self.codes(codes[:, :-1])], 1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x, (self.cos, self.sin))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), codes.flatten())


def caches(model, batch_size):
    """Returns a static cache of keys and values [B, H, T, D] for each block."""
    heads, head_dim = model.blocks[0].shape
    empty = model.positions.new_zeros(batch_size, heads, model.length, head_dim)
    return [(empty.clone(), empty.clone()) for _ in model.blocks]


def step(model, x, kept, position):
    """Samples the codes at a position (an int); attention reads the cache up to it."""
    x = x + model.positions[position]
    rotation = model.cos[position], model.sin[position]
    for block, (keys, values) in zip(model.blocks, kept, strict=True):
        query, key, value = block.heads(x, rotation)
        keys[:, :, position] = key[:, :, 0]
        values[:, :, position] = value[:, :, 0]
        past = keys[:, :, : position + 1], values[:, :, : position + 1]
        x = block.add(x, F.scaled_dot_product_attention(query, *past))
    return draw(model, x)


def masked_step(model, x, kept, position, places):
    """Samples the codes at a position (a tensor [1]), so one program compiles for all positions."""
    x = x + model.positions[position]
    rotation, past = (model.cos[position], model.sin[position]), (places <= position)[None]
    for block, (keys, values) in zip(model.blocks, kept, strict=True):
        query, key, value = block.heads(x, rotation)
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position, value)
        x = block.add(x, F.scaled_dot_product_attention(query, keys, values, attn_mask=past))
    return draw(model, x)


def draw(model, x):
    """Samples codes [B, 1] from the logits at x [B, 1, width]."""
    logits = model.head(model.norm(x))[:, 0].float()
    # Like `multinomial`, which would make the host wait for a GPU.
    noise = torch.empty_like(logits).exponential_()
    return (logits.softmax(-1) / noise).argmax(-1, keepdim=True)


def sampler(model, batch_size, mode):
    """Returns a function that samples a batch of grids."""
    labels = torch.arange(batch_size) % work.LABELS
    places = torch.arange(model.length)
    compiled = torch.compile(masked_step, dynamic=False)

    @torch.inference_mode()
    def run():
        kept = caches(model, batch_size)
        x, drawn = model.labels(labels)[:, None], []
        for position in range(model.length):
            if mode == "eager":
                code = step(model, x, kept, position)
            else:
                code = compiled(model, x, kept, places[position : position + 1], places)
            drawn.append(code)
            x = model.codes(code)
        return torch.cat(drawn, 1)

    return run


def sampling(length, batch_size, variants):
    """Reports the time to sample a batch of grids."""
    for variant in variants or map(", ".join, itertools.product(work.DTYPES, MODES)):
        torch._dynamo.reset()
        dtype, mode = variant.split(", ")
        model = Prior(length, work.GRIDS[length]).eval().to(getattr(torch, dtype))
        run = sampler(model, batch_size, mode)
        run()
        measuring.report("sampling", variant, seconds=measuring.seconds(run))


def training(length, variants):
    """Reports the time of a training step."""
    for variant in variants or map(", ".join, itertools.product(work.DTYPES, MODES)):
        torch._dynamo.reset()
        step_once = training_step(length, variant)
        taken = measuring.step_seconds(step_once, work.WARM_UP_STEPS, work.BLOCK_STEPS, work.BLOCKS)
        measuring.report("training", variant, seconds=taken)


def training_step(length, variant):
    """Returns a function that runs one training step."""
    dtype, mode = variant.split(", ")
    model = Prior(length, work.GRIDS[length]).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), work.LEARNING_RATE, weight_decay=work.WEIGHT_DECAY, fused=True
    )
    run = torch.compile(model, dynamic=False) if mode == "compiled" else model
    codes = torch.from_numpy(work.codes(length)).long()
    labels = torch.arange(len(codes)) % work.LABELS

    def step_once():
        chosen = torch.randint(len(codes), (work.TRAINING_TOKENS // length,))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = run(codes[chosen], labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step_once


if __name__ == "__main__":
    if sys.argv[1] == "training":
        training(int(sys.argv[2]), sys.argv[3:])
    else:
        sampling(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
