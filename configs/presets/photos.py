"""Your own images at 64×64, from the folder that --data.source names; for a 2-core CPU.

`vqbeam run photos --data.source folder:PATH --minutes 45 --run-dir DIR` chooses the training steps
for about that time; without `--minutes`, they are those below. For a GPU, there are `photos128` and
`photos256`.
"""

from vqbeam.configs import Config, DataConfig, EncodeConfig, PriorConfig, SampleConfig, VQVAEConfig

CONFIG = Config(
    name="photos",
    data=DataConfig(source="folder:photos", height=64, width=64, channels=3),
    vqvae=VQVAEConfig(
        num_codes=1024,
        code_dim=64,
        downsampling=8,  # an 8×8 grid: 16×16 halves the error, but stage 2 takes four times as long
        width=128,
        residual_layers=2,
        residual_width=64,
        estimator="diveq",
        balance=0.2,
        batch_size=32,
        steps=3000,
        steps_per_epoch=500,
        optimizer="muon",
        learning_rate=3e-3,
        warmup_steps=100,
        augment="flip",
        finetune_steps=1500,
        perceptual=1.0,
        adversarial=0.05,
    ),
    encode=EncodeConfig(batch_size=256, augment="flip"),
    prior=PriorConfig(
        layers=4,
        width=192,
        heads=6,
        dropout=0.2,  # folders are small: a few thousand images are soon memorized
        batch_size=64,
        steps=3000,
        steps_per_epoch=250,
        early_stopping=3,
        optimizer="muon",
        learning_rate=3e-3,
        warmup_steps=100,
        qk_norm="rms",
        branch_init="zeros",
    ),
    # A prior of few images is unsure of details: at a temperature of 1, shapes fall apart.
    sample=SampleConfig(num=80, temperature=0.8, guidance=3.0, batch_size=80),
)
