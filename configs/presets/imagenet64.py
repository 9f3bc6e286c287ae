"""ImageNet at 64×64: 1.28 million photographs in 1,000 classes; for one large GPU and about a day.

TFDS downloads the dataset (imagenet_resized/64x64, 13 GB). Stage 1 has 0.96 million parameters and
takes 1.3 GFLOP per image and step, 43 PFLOP in all; stage 2 has 307 million, 0.49 TFLOP and 18,700
PFLOP: 15 hours of an H100 at 35% of its peak in bfloat16. A batch is computed in two parts, whose
activations take about 30 GB. This is calculated: nothing has been measured on a GPU yet.
"""

from vqbeam.configs import Config, DataConfig, EncodeConfig, PriorConfig, SampleConfig, VQVAEConfig

CONFIG = Config(
    name="imagenet64",
    data=DataConfig(
        source="tfds:imagenet_resized/64x64",
        validation_split="validation",
        height=64,
        width=64,
        channels=3,
        images_per_shard=10_000,  # 128 shards of about 100 MB
    ),
    vqvae=VQVAEConfig(
        num_codes=1024,
        code_dim=64,
        downsampling=4,  # a 16×16 grid: 256 codes
        width=128,  # width and blocks as in VQ-VAE-2 (Razavi et al. 2019), appendix A
        residual_layers=2,
        residual_width=64,
        batch_size=128,
        steps=250_000,  # 25 passes
        steps_per_epoch=2500,
        learning_rate=3e-4,
        dtype="mixed_bfloat16",
    ),
    encode=EncodeConfig(batch_size=1024),
    prior=PriorConfig(
        layers=24,
        width=1024,  # the depth and width of LlamaGen-L (Sun et al. 2024), table 1
        heads=16,
        dropout=0.1,
        batch_size=256,
        grad_accumulation=2,
        steps=150_000,  # 30 passes
        steps_per_epoch=2500,
        learning_rate=1e-4,
        warmup_steps=5000,
        dtype="mixed_bfloat16",
    ),
    sample=SampleConfig(num=64, temperature=1.0, guidance=2.0, batch_size=256),  # caches: 26 GB
)
