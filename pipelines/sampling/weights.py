"""The weights of a run as safetensors, with the names and layouts of other libraries.

    FOLDER/vqvae    as diffusers' `VQModel.from_pretrained` loads it
    FOLDER/prior    tensors with the names of LlamaGen's transformer where they correspond

docs/export.md has the table of names.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sampling.api import Run
from vqbeam.prior.block import BASE, Block
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.resnet import NormalizedBlock
from vqbeam.vqvae.storage.run_folder import RunFolder

Tensors = dict[str, np.ndarray]


def write_weights(run: Run, folder: epath.Path) -> None:
    """Writes the weights and a `config.json` of both models.

    Args:
        run: A run that `check_exportable` accepts.
        folder: The folder to write.
    """
    models = {
        "vqvae": ("diffusion_pytorch_model", vqmodel_config(run.vqvae), vqmodel_tensors(run.vqvae)),
        "prior": ("model", prior_config(run), prior_tensors(run.prior)),
    }
    for name, (file, config, tensors) in models.items():
        place = folder / name
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        (place / f"{file}.safetensors").write_bytes(safetensors(tensors))


def check_exportable(run: RunFolder) -> None:
    """Raises a VqbeamError if diffusers' `VQModel` cannot represent the VQ-VAE of a run."""
    settings = run.load_config().vqvae
    wanted = {"network": "resnet", "quantizer": "vector", "lookup": "l2", "balance": 0, "grids": 1}
    for name, value in wanted.items():
        found = getattr(settings, name)
        if found != value:
            raise VqbeamError(
                f"vqvae.{name} of {run.root} is {found}, which diffusers' VQModel does not have; "
                f"--format safetensors takes {value}"
            )
    if not settings.residual_layers:
        raise VqbeamError(
            f"vqvae.residual_layers of {run.root} is 0, which diffusers' VQModel does not have; "
            "--format safetensors takes 1 or more"
        )


def vqmodel_config(model: VQVAE) -> dict[str, Any]:
    """Returns the config of the `VQModel` that is equivalent to a VQ-VAE."""
    settings, quantizer = model.architecture, model.quantizer
    height, width, channels = settings["image_shape"]
    blocks = [block for block in model.encoder.layers if isinstance(block, NormalizedBlock)]
    widths = _widths(model)
    return {
        "_class_name": "VQModel",
        "in_channels": channels,
        "out_channels": channels,
        "sample_size": [height, width],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": settings["residual_layers"],
        "norm_num_groups": blocks[0].groups,
        "act_fn": "silu",
        "latent_channels": quantizer.dim,
        "vq_embed_dim": quantizer.dim,
        "num_vq_embeddings": quantizer.num_codes,
        "mid_block_add_attention": False,
    }


def vqmodel_tensors(model: VQVAE) -> Tensors:
    """Returns the weights of that `VQModel`, whose 1×1 convolutions are identities."""
    levels, blocks = len(_widths(model)), model.architecture["residual_layers"]
    identity = np.eye(model.quantizer.dim, dtype="float32")[:, :, None, None]
    tensors = {"quantize.embedding.weight": _array(model.quantizer.vectors())}
    for name in ("quant_conv", "post_quant_conv"):
        tensors |= {f"{name}.weight": identity, f"{name}.bias": identity[0, :, 0, 0] * 0}
    for part, names in {
        "encoder": _encoder_names(levels, blocks),
        "decoder": _decoder_names(levels, blocks),
    }.items():
        layers = [layer for layer in getattr(model, part).layers if layer.weights]
        for name, layer in zip(names, layers, strict=True):
            tensors |= {f"{part}.{name}.{key}": value for key, value in _of_layer(layer).items()}
    return tensors


def _widths(model: VQVAE) -> list[int]:
    """Returns the channels at each resolution, from the full to the lowest."""
    blocks = [layer.width for layer in model.encoder.layers if isinstance(layer, NormalizedBlock)]
    per_level = model.architecture["residual_layers"]
    return blocks[:-2:per_level]  # the last two are in the middle


def _encoder_names(levels: int, blocks: int) -> Iterator[str]:
    yield "conv_in"
    for level in range(levels):
        yield from (f"down_blocks.{level}.resnets.{block}" for block in range(blocks))
        if level < levels - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv"
    yield from ("mid_block.resnets.0", "mid_block.resnets.1", "conv_norm_out", "conv_out")


def _decoder_names(levels: int, blocks: int) -> Iterator[str]:
    yield from ("conv_in", "mid_block.resnets.0", "mid_block.resnets.1")
    for level in range(levels):
        yield from (f"up_blocks.{level}.resnets.{block}" for block in range(blocks + 1))
        if level < levels - 1:
            yield f"up_blocks.{level}.upsamplers.0.conv"
    yield from ("conv_norm_out", "conv_out")


def _of_layer(layer: keras.Layer) -> Tensors:
    """Returns the weights of a layer with the names and axes of PyTorch."""
    if isinstance(layer, NormalizedBlock):
        parts = {"conv_shortcut": layer.shortcut} if layer.shortcut.built else {}
        for number, (norm, conv) in enumerate(zip(layer.norms, layer.convs, strict=True), 1):
            parts |= {f"norm{number}": norm, f"conv{number}": conv}
        return {
            f"{part}.{name}": value
            for part, inner in parts.items()
            for name, value in _of_layer(inner).items()
        }
    if isinstance(layer, keras.layers.GroupNormalization):
        return {"weight": _array(layer.gamma), "bias": _array(layer.beta)}
    kernel = np.transpose(_array(layer.kernel), (3, 2, 0, 1))  # [out, in, rows, columns]
    return {"weight": kernel, "bias": _array(layer.bias)}


def prior_config(run: Run) -> dict[str, Any]:
    """Returns the settings of a prior, with LlamaGen's names where it has them."""
    prior, layout = run.prior, run.prior.layout
    block = prior.blocks[0]
    return {
        "model_type": "vqbeam-prior",
        "dim": prior.width,
        "n_layer": len(prior.blocks),
        "n_head": prior.heads,
        "n_kv_head": prior.kv_heads,
        "ffn_hidden": block.hidden,
        "norm_eps": prior.output_norm.epsilon,
        "qk_norm": prior.qk_norm,
        "rope_base": BASE,
        "vocab_size": layout.num_codes,
        "block_size": layout.length,
        "cls_token_num": 1,
        "num_classes": prior.num_labels,
        "conditioning": prior.conditioning,
        "labels": list(run.prior_labels.names),
        "grids": [list(grid) for grid in layout.grids],
        "codes_per_position": layout.depth,
    }


def prior_tensors(prior: CodePrior) -> Tensors:
    """Returns the weights of a prior, named as in LlamaGen's `Transformer`."""
    kernel = _array(prior.head.kernel)  # [levels, width, K]
    tensors = {
        "cls_embedding.embedding_table.weight": _array(prior.label_embedding.embeddings),
        "tok_embeddings.weight": _array(prior.code_embedding.embeddings),
        "position_embedding.weight": _array(prior.position_embedding.position_embeddings),
        "norm.weight": _array(prior.output_norm.scale),
        "output.weight": np.concatenate(np.swapaxes(kernel, 1, 2)),
    }
    for number, block in enumerate(prior.blocks):
        tensors |= {f"layers.{number}.{k}": value for k, value in _of_block(block).items()}
    return tensors


def _of_block(block: Block) -> Tensors:
    gate, up = np.split(_array(block.gate_and_up.kernel).T, 2)
    scales = {
        f"attention.{part}_norm.weight": _interleaved_pairs(_array(norm.scale))
        for part, norm in zip("qk", block.qk_norms, strict=False)
    }
    return scales | {
        "attention_norm.weight": _array(block.attention_norm.scale),
        "attention.wqkv.weight": _interleaved(_array(block.qkv.kernel).T, block),
        "attention.wo.weight": _array(block.attention_output.kernel).T,
        "ffn_norm.weight": _array(block.mlp_norm.scale),
        "feed_forward.w1.weight": gate,
        "feed_forward.w3.weight": up,
        "feed_forward.w2.weight": _array(block.down.kernel).T,
    }


def _interleaved(rows: np.ndarray, block: Block) -> np.ndarray:
    """Returns rows [(H + 2 G) · D, width] with the two rows of each rotated pair side by side.

    Values are not rotated.
    """
    heads = rows.reshape(-1, block.head_dim, block.width)
    values = heads[block.heads + block.kv_heads :]
    rotated = [_interleaved_pairs(head) for head in heads[: block.heads + block.kv_heads]]
    return np.concatenate([*rotated, *values])


def _interleaved_pairs(head: np.ndarray) -> np.ndarray:
    """Returns the rows [D, ...] of a head with those of each rotated pair side by side.

    Here, a pair is `x[i], x[i + D/2]`; in LlamaGen, it is `x[2i], x[2i + 1]`.
    """
    return np.swapaxes(head.reshape(2, -1, *head.shape[1:]), 0, 1).reshape(head.shape)


def _array(weight: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(weight).astype("float32")


def safetensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Returns float32 tensors as a file in the format of https://github.com/huggingface/safetensors.

    It consists of the size of the header in 8 bytes; the header, which is JSON with dtype, shape
    and offsets of each tensor, padded with spaces to a multiple of 8 bytes; and the values.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + 4 * tensors[name].size
        shape = list(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *_values(tensors)])


def _values(tensors: Mapping[str, np.ndarray]) -> Iterable[bytes]:
    return (np.ascontiguousarray(tensors[name], "<f4").tobytes() for name in sorted(tensors))
