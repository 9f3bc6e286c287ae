"""The PyTorch side of `gpu.py`: the same models, as fast as PyTorch runs them.

    python benchmarks/gpu_torch.py stage1|stage2|encode PRESET
    python benchmarks/gpu_torch.py sampling PRESET BATCH

Data are on the device, images are channels-last, and all is bfloat16 but for the search of the
nearest code. On a GPU, a step is compiled with `max-autotune`, or compiled and then captured with
backward pass and optimizer in one CUDA graph; both are measured. Sampling has a static cache, and
the host waits only for the finished grids. Prints a JSON object for each measurement.
"""

import math
import sys

import gpu_work as work
import measuring
import torch
import torch.nn.functional as F
from stage1_torch import VQVAE
from stage2_torch import Prior, caches, masked_step
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Names of the variants, and the mode in which `torch.compile` has them.
COMPILED = {"max-autotune": "max-autotune", "CUDA graph": "max-autotune-no-cudagraphs"}
VARIANTS = tuple(COMPILED) if DEVICE == "cuda" else ("eager", "compiled")


class Quantizer(nn.Module):
    """The quantizer of van den Oord et al. 2017, whose codebook follows moving averages."""

    def __init__(self, settings):
        super().__init__()
        self.commitment, self.decay = settings.commitment, settings.ema_decay
        size = settings.num_codes, settings.code_dim
        self.register_buffer("codebook", torch.randn(size))
        self.register_buffer("counts", torch.ones(size[0]))
        self.register_buffer("sums", self.codebook.clone())

    def forward(self, z):
        """Returns the quantized vectors, the codes and the loss of vectors [B, N, D]."""
        vectors = z.flatten(0, 1).float()
        with torch.no_grad(), torch.autocast(DEVICE, enabled=False):
            codes = self.nearest(vectors)
            quantized = self.codebook[codes]
            if self.training:
                self.update(vectors, codes)
        loss = self.commitment * F.mse_loss(vectors, quantized)
        passed = vectors + (quantized - vectors).detach()
        return passed.view(z.shape), codes.view(z.shape[:2]), loss

    def nearest(self, vectors):
        """Returns the nearest codes [N] of vectors [N, D]."""
        lengths = self.codebook.square().sum(1)
        return torch.addmm(lengths, vectors, self.codebook.T, alpha=-2).argmin(1)

    def update(self, vectors, codes):
        """Moves the averages towards a batch, and the codebook with them."""
        counts = torch.zeros_like(self.counts).index_add_(0, codes, torch.ones_like(vectors[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codebook.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])


def build_vqvae(config):
    """Returns the VQ-VAE of a preset, on the device."""
    settings = config.vqvae
    model = VQVAE(
        Quantizer(settings),
        dim=settings.code_dim,
        width=settings.width,
        layers=settings.residual_layers,
        hidden=settings.residual_width,
    )
    return model.to(DEVICE, memory_format=torch.channels_last)


def build_prior(config, dropout):
    """Returns the prior of a preset, on the device."""
    settings = config.prior
    return Prior(
        math.prod(work.grid(config)),
        config.vqvae.num_codes,
        layers=settings.layers,
        width=settings.width,
        heads=settings.heads,
        dropout=dropout,
    ).to(DEVICE)


def on_device(images):
    """Returns uint8 images [N, H, W, C] as [N, C, H, W] on the device, channels last."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    return tensor.to(DEVICE, memory_format=torch.channels_last)


def scaled(images):
    """Returns uint8 images as numbers in [−1, 1]."""
    return images.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1.0


def compiled(function, variant):
    """Returns a model or a function as a variant runs it."""
    if variant == "eager":
        return function
    return torch.compile(function, mode=COMPILED.get(variant, "default"), dynamic=False)


def captured(step, variant):
    """Returns a step that needs no input and returns nothing; for "CUDA graph", its replay."""
    if variant != "CUDA graph":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def finish():
    """Waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def stage1(name):
    """Reports the seconds per training step."""
    config = work.preset(name)
    settings = config.vqvae
    images = on_device(work.images(config, 8 * settings.batch_size))

    def batch():
        return (scaled(images[torch.randint(len(images), (settings.batch_size,), device=DEVICE)]),)

    def make():
        model = build_vqvae(config).train()
        return model, torch.optim.Adam(model.parameters(), settings.learning_rate, **FAST)

    time_training("stage1", name, make, batch)


def stage2(name):
    """Reports the seconds per training step."""
    config = work.preset(name)
    settings = config.prior
    codes = torch.from_numpy(work.codes(config)).long().flatten(1).to(DEVICE)
    labels = torch.arange(len(codes), device=DEVICE) % work.LABELS

    def batch():
        chosen = torch.randint(len(codes), (settings.part_size,), device=DEVICE)
        return codes[chosen], labels[chosen]

    def make():
        model = build_prior(config, settings.dropout).train()
        return model, torch.optim.AdamW(
            model.parameters(),
            settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            **FAST,
        )

    time_training("stage2", name, make, batch, settings.grad_accumulation, settings.clip_norm)


FAST = {"fused": True, "capturable": DEVICE == "cuda"}


def time_training(part, name, make, batch, parts=1, clip_norm=0.0):
    """Reports the seconds per training step of each variant.

    Args:
        part: "stage1" or "stage2".
        name: The preset.
        make: Returns a new model, which returns its loss, and its optimizer.
        batch: Returns the inputs of the model for a part of a batch.
        parts: Parts of a batch, whose gradients are added up.
        clip_norm: The norm to which gradients are clipped; 0 for none.
    """
    steps = 1 if measuring.SMOKE else work.STEPS.get((part, name), work.USUAL_STEPS)
    for variant in VARIANTS:
        torch._dynamo.reset()
        model, optimizer = make()
        run = compiled(model, variant)

        def step(model=model, optimizer=optimizer, run=run):
            for _ in range(parts):
                # A cache of casts would not live through a CUDA graph.
                with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
                    loss = run(*batch()) / parts
                loss.backward()
            if clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        once = captured(step, variant)

        def block(once=once):
            for _ in range(steps):
                once()
            finish()

        block()
        seconds = measuring.seconds(block, least=work.BLOCKS, budget=0) / steps
        measuring.report(part, variant, seconds=seconds)


@torch.no_grad()
def encode(name):
    """Reports the time from a batch of images on the host to their codes on the host."""
    config = work.preset(name)
    model = build_vqvae(config).eval()
    host = torch.from_numpy(work.images(config, config.encode.batch_size)).permute(0, 3, 1, 2)
    host = host.pin_memory() if DEVICE == "cuda" else host
    images = torch.empty_like(host, device=DEVICE)
    codes = torch.empty(len(host), math.prod(work.grid(config)), dtype=torch.int32, device=DEVICE)

    def codes_of(images):
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
            z = model.encoder(scaled(images))
        vectors = z.permute(0, 2, 3, 1).reshape(-1, config.vqvae.code_dim).float()
        return model.quantizer.nearest(vectors).view(len(images), -1)

    for variant in VARIANTS:
        torch._dynamo.reset()
        run = compiled(codes_of, variant)
        once = captured(lambda run=run: codes.copy_(run(images)), variant)

        def whole(once=once):
            images.copy_(host, non_blocking=True)
            once()
            return codes.cpu()  # waits

        whole()
        measuring.report("encode", variant, seconds=measuring.seconds(whole))


@torch.no_grad()
def sampling(name, batch_size):
    """Reports the time to sample a batch of grids in bfloat16."""
    config, batch_size = work.preset(name), int(batch_size)
    model = build_prior(config, dropout=0.0).eval().to(torch.bfloat16)
    labels = torch.arange(batch_size, device=DEVICE) % work.LABELS
    places = torch.arange(model.length, device=DEVICE)
    kept = caches(model, batch_size)
    x = model.labels(labels)[:, None].clone()
    position = torch.zeros(1, dtype=torch.long, device=DEVICE)
    codes = torch.zeros(batch_size, model.length, dtype=torch.long, device=DEVICE)
    for tensor in (x, position, codes, *(cache for pair in kept for cache in pair)):
        torch._dynamo.mark_static_address(tensor)  # else CUDA graphs would copy them

    def step():
        code = masked_step(model, x, kept, position, places)
        codes.index_copy_(1, position, code)
        x.copy_(model.codes(code))
        position.add_(1)

    for variant in VARIANTS:
        torch._dynamo.reset()
        position.zero_()
        once = captured(compiled(step, variant), variant)

        def draw(once=once):
            position.zero_()
            x.copy_(model.labels(labels)[:, None])
            for _ in range(model.length):
                once()
            return codes.cpu()  # waits

        draw()
        measuring.report("sampling", variant, seconds=measuring.seconds(draw))


if __name__ == "__main__":
    part, *arguments = sys.argv[1:]
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    measuring.report("device", name=f"{device} with torch {torch.__version__}")
    {"stage1": stage1, "stage2": stage2, "encode": encode, "sampling": sampling}[part](*arguments)
