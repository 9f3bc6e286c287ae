"""CIFAR-10: 60,000 photographs, 32×32, in 10 classes; for a 2-core CPU.

TFDS downloads it (160 MB). On two cores of an AMD EPYC with bfloat16 it took 25 minutes:
reconstructions at a PSNR of 25.09 dB (0.0489 of the pixels' variance), all codes used with a
perplexity of 475, and a prior of 5.151 nats per code (0.1548 bits per dimension), all on the test
split.
"""

from vqbeam.configs import Config, DataConfig, EncodeConfig, PriorConfig, SampleConfig, VQVAEConfig

CONFIG = Config(
    name="cifar10",
    data=DataConfig(source="tfds:cifar10", height=32, width=32, channels=3),
    vqvae=VQVAEConfig(
        # A codebook of what neighbours cannot predict: a twelfth less error at the same bits.
        quantizer="predictive",
        num_codes=512,  # van den Oord et al. 2017, section 4.1, as the width, blocks and β
        code_dim=64,
        downsampling=4,  # an 8×8 grid
        width=128,
        residual_layers=2,
        residual_width=28,  # the paper's 32, less what the predictions multiply
        estimator="diveq",  # 4% less error than with the straight-through gradient
        balance=0.2,  # without it the codes' perplexity is about 400
        batch_size=32,
        steps=10_000,  # 6.4 passes over the 50,000 training images
        steps_per_epoch=1000,
        optimizer="muon",
        learning_rate=3e-3,
        warmup_steps=200,
        dtype="mixed_bfloat16",
    ),
    encode=EncodeConfig(batch_size=256),
    prior=PriorConfig(
        layers=4,
        width=192,  # 12 million codes are not enough for a wider one to be better
        heads=6,
        batch_size=64,
        steps=3000,  # 3.8 passes
        steps_per_epoch=500,
        learning_rate=1e-3,
        warmup_steps=200,
        dtype="mixed_bfloat16",
    ),
    sample=SampleConfig(num=80, temperature=0.95, guidance=2.0, batch_size=80),
)
