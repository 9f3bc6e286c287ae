"""CIFAR-10 with the original VQ-VAE size and a larger prior; for one GPU.

TFDS downloads the dataset (160 MB). Results have not been measured yet.
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
        batch_size=128,  # as in the paper
        steps=250_000,  # as in the paper
        steps_per_epoch=2500,
        learning_rate=2e-4,  # as in the paper
        dtype="mixed_bfloat16",
    ),
    encode=EncodeConfig(batch_size=1024),
    prior=PriorConfig(
        layers=12,
        width=512,
        heads=8,
        dropout=0.2,  # 40 million weights overfit 50,000 images
        batch_size=128,
        steps=40_000,  # 100 passes
        steps_per_epoch=2000,
        learning_rate=5e-4,
        warmup_steps=2000,
        dtype="mixed_bfloat16",
    ),
    sample=SampleConfig(num=80, temperature=1.0, guidance=2.0, batch_size=80),
)
