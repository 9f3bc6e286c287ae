"""The PyTorch side of `stage1.py`: the same VQ-VAE, with vector-quantize-pytorch.

    python benchmarks/stage1_torch.py training [VARIANT ...]
    python benchmarks/stage1_torch.py quantizer N K D [VARIANT ...]

Prints a JSON object for each measurement. A variant is, for example, "float32, channels-last,
compiled"; by default, all variants are measured.
"""

import itertools
import sys

import measuring
import stage1_work as work
import torch
import torch.nn.functional as F
from torch import nn

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
MODES = ("eager", "compiled")


class ResidualBlock(nn.Module):
    """x + conv1×1(relu(conv3×3(relu(x))))."""

    def __init__(self, width, hidden):
        super().__init__()
        self.conv_in = nn.Conv2d(width, hidden, 3, padding=1, bias=False)
        self.conv_out = nn.Conv2d(hidden, width, 1, bias=False)

    def forward(self, x):
        """Maps [B, width, H, W] to the same shape."""
        return x + self.conv_out(F.relu(self.conv_in(F.relu(x))))


def residual_stack(width, layers, hidden):
    """Returns the residual blocks and the activation after them."""
    return [*(ResidualBlock(width, hidden) for _ in range(layers)), nn.ReLU()]


def build_quantizer(num_codes, dim):
    """Returns the library's quantizer with the settings of van den Oord et al. 2017."""
    from vector_quantize_pytorch import VectorQuantize  # not there where gpu_torch.py runs

    return VectorQuantize(
        dim=dim,
        codebook_size=num_codes,
        decay=work.DECAY,
        commitment_weight=work.COMMITMENT,
        kmeans_init=False,
        rotation_trick=False,
    )


class VQVAE(nn.Module):
    """The network of `vqvae/networks.py`, layer by layer, with padding that equals "same"."""

    def __init__(
        self,
        quantizer,
        dim=work.CODE_DIM,
        width=work.WIDTH,
        layers=work.RESIDUAL_LAYERS,
        hidden=work.RESIDUAL_WIDTH,
    ):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            *residual_stack(width, layers, hidden),
            nn.Conv2d(width, dim, 1),
        )
        self.quantizer = quantizer
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1),
            *residual_stack(width, layers, hidden),
            nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, 3, 4, stride=2, padding=1),
        )

    def forward(self, images):
        """Maps images [B, 3, H, W] in [−1, 1] to the loss."""
        z = self.encoder(images).permute(0, 2, 3, 1)
        quantized, _, commitment = self.quantizer(z.flatten(1, 2))
        images_again = self.decoder(quantized.view(z.shape).permute(0, 3, 1, 2))
        return F.mse_loss(images_again.float(), images) + commitment


def classic():
    """Returns the VQ-VAE of this benchmark."""
    return VQVAE(build_quantizer(work.NUM_CODES, work.CODE_DIM))


def autocast(dtype):
    """Returns a context in which the network computes in `dtype`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def training_step(variant):
    """Returns a function that runs one training step, and the model."""
    dtype, layout, mode = variant.split(", ")
    model = classic().train().to(memory_format=LAYOUTS[layout])
    optimizer = torch.optim.Adam(model.parameters(), work.LEARNING_RATE, fused=True)
    run = torch.compile(model) if mode == "compiled" else model
    images = torch.from_numpy(work.training_images()).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=LAYOUTS[layout])

    def step():
        batch = images[torch.randint(len(images), (work.BATCH_SIZE,))]
        batch = batch.to(torch.float32, memory_format=LAYOUTS[layout]) / 127.5 - 1.0
        with autocast(dtype):
            loss = run(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step, model


def multiply_adds(model):
    """Counts the multiply-adds of the convolutions in the forward pass of one image."""
    counts = []

    def count(layer, inputs, output):
        positions = min(inputs[0][0, 0].numel(), output[0, 0].numel())
        counts.append(layer.weight.numel() * positions)

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, work.IMAGE_SIDE, work.IMAGE_SIDE))
    return sum(counts)


def time_training(variant):
    """Reports the time of a training step."""
    step, _ = training_step(variant)
    taken = measuring.step_seconds(step, work.WARM_UP_STEPS, work.BLOCK_STEPS, work.BLOCKS)
    measuring.report(f"training, {variant.split(', ')[0]}", variant, seconds=taken)


def training(variants):
    """Reports the training time, the size of the network, and the speed of a matrix product."""
    for variant in variants or map(", ".join, itertools.product(work.DTYPES, LAYOUTS, MODES)):
        torch._dynamo.reset()
        time_training(variant)
    for dtype in work.DTYPES:
        a, b = (torch.randn(shape).to(getattr(torch, dtype)) for shape in work.matmul_shapes())
        measuring.report(
            f"matmul, {dtype}", shape=work.MATMUL, seconds=measuring.seconds(lambda a=a, b=b: a @ b)
        )
    model = classic()
    parameters = sum(weight.numel() for weight in model.parameters())
    measuring.report("network", parameters=parameters, multiply_adds=multiply_adds(model))


def quantizer(size, num_codes, dim, variants):
    """Reports the time and memory of the forward pass, in evaluation and in training mode."""
    vectors, codebook = map(torch.from_numpy, work.quantizer_operands(size, num_codes, dim))
    layer = build_quantizer(num_codes, dim)
    build_quantizer(8, dim)(vectors[:, :8])  # triggers one-time initialization
    before = measuring.resident_bytes()
    # Compiled variants are last, because compilation leaves memory in use.
    variants = variants or [f"{dtype}, {mode}" for mode in MODES for dtype in work.DTYPES]
    for variant, training in itertools.product(variants, (False, True)):
        torch._dynamo.reset()
        layer.train(training)
        layer._codebook.embed.data.copy_(codebook)
        forward = quantizer_forward(layer, vectors, variant)
        error = (forward()[0].detach() - vectors).square().mean().item()
        measuring.report(
            "training" if training else "evaluation",
            variant,
            seconds=measuring.seconds(forward),
            bytes=measuring.peak_bytes(forward, before),
            error=error,
        )


def quantizer_forward(layer, vectors, variant):
    """Returns a function that quantizes the vectors."""
    dtype, mode = variant.split(", ")
    run = torch.compile(layer) if mode == "compiled" else layer

    def forward():
        with torch.set_grad_enabled(layer.training), autocast(dtype):
            return run(vectors)

    return forward


if __name__ == "__main__":
    if sys.argv[1] == "training":
        training(sys.argv[2:])
    else:
        quantizer(*map(int, sys.argv[2:5]), sys.argv[5:])
