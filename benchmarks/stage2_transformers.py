"""The Hugging Face side of `stage2.py`: GPT-2 of the same size, sampled by `generate`.

    python benchmarks/stage2_transformers.py sampling T BATCH [VARIANT ...]

Prints a JSON object for each measurement. A variant is "float32" or "bfloat16"; by default, both
are measured.
"""

import sys

import measuring
import stage2_work as work
import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed


def build(length, dtype):
    """Returns an untrained GPT-2, whose start token is K."""
    config = GPT2Config(
        vocab_size=work.GRIDS[length] + 1,
        n_positions=length + 1,
        n_embd=work.WIDTH,
        n_layer=work.LAYERS,
        n_head=work.HEADS,
        bos_token_id=work.GRIDS[length],
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval().to(getattr(torch, dtype))


def sampling(length, batch_size, variants):
    """Reports the time to sample a batch of grids."""
    set_seed(0)
    first = torch.full((batch_size, 1), work.GRIDS[length])
    for dtype in variants or work.DTYPES:
        model = build(length, dtype)

        def run(model=model):
            return model.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                top_k=0,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=0,
            )

        assert run().shape == (batch_size, length + 1)
        measuring.report("sampling", dtype, seconds=measuring.seconds(run))


if __name__ == "__main__":
    sampling(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
