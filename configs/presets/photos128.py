"""Your own images at 128×128, from the folder that --data.source names; two hours on one GPU.

Stage 1 has 21.2 million parameters and takes 168 GFLOP per image and step, 537 PFLOP in all;
stage 2 has 91.5 million, 142 GFLOP and 1,460 PFLOP. An H100 at 25% and 35% of its peak in bfloat16
takes about two hours, with the last steps of the decoder; `--minutes` chooses fewer. This is
calculated: nothing has been measured on a GPU yet.
"""

from vqbeam.configs import Config, DataConfig, EncodeConfig, PriorConfig, SampleConfig, VQVAEConfig

CONFIG = Config(
    name="photos128",
    data=DataConfig(source="folder:photos", height=128, width=128, channels=3),
    vqvae=VQVAEConfig(
        num_codes=4096,
        code_dim=64,
        restart_below=0.03,  # with K = 4096, nearly all codes stay in use (docs/results.md)
        downsampling=8,  # a 16×16 grid: 256 codes
        network="resnet",
        width=64,  # half of VQGAN (Esser et al. 2021)
        residual_layers=2,
        batch_size=64,
        steps=50_000,
        steps_per_epoch=1000,
        learning_rate=3e-4,
        warmup_steps=500,
        augment="flip",
        finetune_steps=20_000,
        perceptual=1.0,
        adversarial=0.05,
        dtype="mixed_bfloat16",
    ),
    encode=EncodeConfig(batch_size=256, augment="flip"),
    prior=PriorConfig(
        layers=12,
        width=768,  # the depth and width of LlamaGen-B (Sun et al. 2024), table 1
        heads=12,
        dropout=0.1,
        batch_size=256,
        grad_accumulation=4,  # a quarter of the activations, which would take some 30 GB
        steps=40_000,
        steps_per_epoch=1000,
        early_stopping=5,
        learning_rate=3e-4,
        warmup_steps=1000,
        qk_norm="rms",
        branch_init="zeros",
        dtype="mixed_bfloat16",
    ),
    sample=SampleConfig(num=80, guidance=3.0, guidance_schedule="cosine", batch_size=256),
)
