"""CIFAR-10 with the original VQ-VAE size and a larger prior; for one GPU and about five minutes.

TFDS downloads the dataset (160 MB). Stage 1 has 4.5 million parameters and takes 1.7 GFLOP per
image and step, 8.8 PFLOP in all; stage 2 has 39 million, 15 GFLOP and 39 PFLOP. An H100 at 15% and
35% of its peak in bfloat16 would take one and two minutes; preparing, compiling and encoding take
about another two. This is calculated: nothing has been measured on a GPU yet.
"""

from vqbeam.configs import Config, DataConfig, EncodeConfig, PriorConfig, SampleConfig, VQVAEConfig

CONFIG = Config(
    name="cifar10_gpu",
    data=DataConfig(source="tfds:cifar10", height=32, width=32, channels=3),
    vqvae=VQVAEConfig(
        num_codes=512,  # K, width, blocks and β follow van den Oord et al. 2017, section 4.1
        code_dim=64,
        downsampling=4,
        width=256,
        residual_layers=2,
        residual_width=256,  # the paper's blocks keep the full width
        batch_size=512,  # the paper: 128, and 250,000 steps at 2e-4
        steps=10_000,  # 102 passes
        steps_per_epoch=1000,
        learning_rate=6e-4,
        warmup_steps=500,
        dtype="mixed_bfloat16",
    ),
    encode=EncodeConfig(batch_size=1024),
    prior=PriorConfig(
        layers=12,
        width=512,
        heads=8,
        dropout=0.2,  # 40 million weights overfit 50,000 images
        batch_size=256,
        steps=10_000,  # 51 passes
        steps_per_epoch=1000,
        learning_rate=7e-4,
        warmup_steps=500,
        dtype="mixed_bfloat16",
    ),
    sample=SampleConfig(num=80, temperature=1.0, guidance=2.0, batch_size=1024),  # caches: 6 GB
)
