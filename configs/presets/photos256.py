"""Your own images at 256×256, from the folder that --data.source names; three hours on one GPU.

Stage 1 has 28.3 million parameters and takes 661 GFLOP per image and step, 1,060 PFLOP in all;
stage 2 has 91.5 million, 142 GFLOP and 1,460 PFLOP. An H100 at 25% and 35% of its peak in bfloat16
takes about three hours, with the last steps of the decoder; `--minutes` chooses fewer. This is
calculated: nothing has been measured on a GPU yet.
"""

from vqbeam.configs import override
from vqbeam.configs.presets import photos128

CONFIG = override(
    photos128.CONFIG,
    {
        "name": "photos256",
        "data.height": 256,
        "data.width": 256,
        "vqvae.downsampling": 16,  # the same 16×16 grid
        "vqvae.batch_size": 32,
        "encode.batch_size": 64,  # the widest layer of 256 images would have 2³¹ numbers
        "sample.batch_size": 64,
    },
)
