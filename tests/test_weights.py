"""The export as safetensors: the prior in NumPy, and the VQ-VAE in diffusers.

Set DIFFUSERS_PYTHON to a Python with torch, diffusers and safetensors for the latter, or run
`make test-diffusers`, which installs them.
"""

import json
import os
import subprocess

import keras
import numpy as np
import pytest
from keras import ops
from measured_run import add_models

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.cli.main import main
from vqbeam.pipelines.sampling.weights import prior_tensors, safetensors
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.fitting.fit import save_model
from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import MODEL_FILE, load_vqvae

pytestmark = pytest.mark.slow

RESNET = dict(vqvae__network="resnet", vqvae__residual_layers=2, data__width=16)

IN_DIFFUSERS = """
import sys
import numpy as np
import torch
from diffusers import VQModel
from safetensors.numpy import load_file

folder, given, found = sys.argv[1:]
model, report = VQModel.from_pretrained(folder + "/vqvae", output_loading_info=True)
assert not any(report.values()), report
assert all(len(value.shape) for value in load_file(folder + "/prior/model.safetensors").values())
images = torch.from_numpy(np.load(given))
with torch.no_grad():
    latents = model.encode(images).latents
    quantized, _, (_, _, codes) = model.quantize(latents)
    decoded = model.decode(latents).sample
np.savez(found, latents=latents, codes=codes, quantized=quantized, decoded=decoded)
"""


def read_safetensors(data):
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    header, values = json.loads(data[8 : 8 + size]), data[8 + size :]
    assert header.pop("__metadata__") == {"format": "pt"}
    return {
        name: np.frombuffer(values[slice(*of["data_offsets"])], "<f4").reshape(of["shape"])
        for name, of in header.items()
    }


@pytest.fixture
def make_run(prepared_run, tiny_config):
    """Makes a run whose VQ-VAE has no weight that is 0 or 1, as norms and biases have at first."""

    def make(**changes):
        run, pixels = prepared_run(tiny_config(**RESNET | changes))
        vqvae, _ = add_models(run, pixels)
        keras.utils.set_random_seed(1)
        for weight in vqvae.trainable_weights:
            weight.assign(weight + 0.1 * keras.random.normal(weight.shape))
        if vqvae.quantizer._has_moves:
            moves = vqvae.quantizer.moves
            moves.assign(0.1 * keras.random.normal(moves.shape))
        run.begin("train-vqvae")
        save_model(vqvae, run.folder("train-vqvae") / MODEL_FILE)
        run.finish("train-vqvae", [run.folder("train-vqvae") / MODEL_FILE])
        return run, pixels

    return make


@pytest.mark.skipif("DIFFUSERS_PYTHON" not in os.environ, reason="takes make test-diffusers")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(vqvae__downsampling=2, vqvae__residual_layers=1, data__channels=3),
        dict(vqvae__codebook_update="gradient", vqvae__restart_below=0.1),
    ],
)
def test_diffusers_computes_the_same(make_run, tmp_path, changes, capsys):
    run, pixels = make_run(**changes)
    assert main(["export", str(run.root), "--format=safetensors", f"--output={tmp_path}/out"]) == 0
    assert f"{tmp_path}/out/vqvae" in capsys.readouterr().out
    images = (pixels["validation"] / 127.5 - 1).astype("float32")
    np.save(tmp_path / "images.npy", images.transpose(0, 3, 1, 2))
    places = [tmp_path / name for name in ("out", "images.npy", "found.npz")]
    subprocess.run(
        [os.environ["DIFFUSERS_PYTHON"], "-c", IN_DIFFUSERS, *map(str, places)],
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    model, theirs = load_vqvae(run), dict(np.load(tmp_path / "found.npz"))
    codes = ops.convert_to_numpy(model.encode(pixels["validation"]))
    assert len(np.unique(codes)) > 2
    np.testing.assert_array_equal(theirs["codes"].reshape(codes.shape), codes)
    ours = {
        "latents": model.encoder(images),
        "quantized": model.latents(codes),
        "decoded": model.decoder(model.latents(codes)),
    }
    for name, value in ours.items():
        theirs_last = theirs[name].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(theirs_last, value, atol=1e-4, err_msg=name)


def test_what_is_written(make_run, tmp_path):
    run, _ = make_run()
    assert main(["export", str(run.root), "--format=safetensors", f"--output={tmp_path}/out"]) == 0
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        "out/prior/config.json",
        "out/prior/model.safetensors",
        "out/vqvae/config.json",
        "out/vqvae/diffusion_pytorch_model.safetensors",
    ]
    config = json.loads((tmp_path / "out/vqvae/config.json").read_text())
    assert config["block_out_channels"] == [8, 16, 32] and config["num_vq_embeddings"] == 12
    tensors = read_safetensors((tmp_path / files[3]).read_bytes())
    model = load_vqvae(run)
    np.testing.assert_array_equal(tensors["quantize.embedding.weight"], model.quantizer.codebook)
    conv = model.encoder.layers[1].kernel
    np.testing.assert_array_equal(
        tensors["encoder.conv_in.weight"], np.transpose(conv, (3, 2, 0, 1))
    )
    shapes = {name: value.shape for name, value in tensors.items()}
    assert shapes["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"] == (16, 8, 1, 1)
    assert shapes["decoder.up_blocks.2.resnets.2.conv2.weight"] == (8, 8, 3, 3)
    assert shapes["decoder.up_blocks.1.upsamplers.0.conv.weight"] == (16, 16, 3, 3)
    config = json.loads((tmp_path / "out/prior/config.json").read_text())
    assert config["labels"] == ["a", "b"] and config["vocab_size"] == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vqvae__network="conv"), "vqvae.network of .* is conv, which .*; .* takes resnet"),
        (dict(vqvae__lookup="cosine"), "vqvae.lookup of .* is cosine, which .*; .* takes l2"),
        (dict(vqvae__quantizer="simvq"), "quantizer of .* is simvq, which .* takes vector"),
        (dict(vqvae__balance=0.5), "balance of .* is 0.5, which .* takes 0"),
        (dict(vqvae__residual_layers=0), "residual_layers of .* is 0, which .* takes 1 or more"),
    ],
)
def test_what_diffusers_does_not_have(tmp_path, tiny_config, changes, message):
    from vqbeam.pipelines.sampling.export import export

    run = RunFolder(tmp_path / "run")
    run.start(tiny_config(**RESNET | changes))
    with pytest.raises(VqbeamError, match=message) as refused:
        export(str(run.root), str(tmp_path / "out"), "safetensors")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def llamagen(tensors, tokens, label, settings):
    """The logits of LlamaGen's transformer in NumPy, with positions that are learned as well."""
    heads, groups, dim, (rows, columns), base = settings

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * weight

    def rotated(x):  # [T, heads, D], pairs side by side
        pairs = x[..., 0::2] + 1j * x[..., 1::2]
        frequencies = base ** -(np.arange(0, dim // 2, 2) / (dim // 2))
        places = np.indices((rows, columns)).reshape(2, -1)
        angles = np.concatenate([place[:, None] * frequencies for place in places], axis=1)
        angles = np.concatenate([np.zeros((1, dim // 2)), angles])[: len(x)]
        pairs = pairs * np.exp(1j * angles)[:, None]
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    h = np.concatenate(
        [
            tensors["cls_embedding.embedding_table.weight"][[label]],
            tensors["tok_embeddings.weight"][tokens[:-1]],
        ]
    )
    h = h + tensors["position_embedding.weight"]
    for layer in range(sum(name.endswith("wqkv.weight") for name in tensors)):
        w = {n.split(".", 2)[2]: v for n, v in tensors.items() if n.startswith(f"layers.{layer}.")}
        qkv = norm(h, w["attention_norm.weight"]) @ w["attention.wqkv.weight"].T
        q, k, v = np.split(qkv.reshape(len(h), -1, dim), [heads, heads + groups], axis=1)
        if "attention.q_norm.weight" in w:
            q, k = norm(q, w["attention.q_norm.weight"]), norm(k, w["attention.k_norm.weight"])
        q, k = rotated(q), rotated(k)
        k, v = (np.repeat(each, heads // groups, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
        scores = np.where(np.tri(len(h), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
        h = h + attended.reshape(len(h), -1) @ w["attention.wo.weight"].T
        x = norm(h, w["ffn_norm.weight"])
        gate = x @ w["feed_forward.w1.weight"].T
        gate = gate / (1 + np.exp(-gate))
        h = h + (gate * (x @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return norm(h, tensors["norm.weight"]) @ tensors["output.weight"].T


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_prior_in_numpy(qk_norm):
    keras.utils.set_random_seed(0)
    sizes = dict(layers=2, width=32, heads=4, kv_heads=2, qk_norm=qk_norm)
    prior = CodePrior(CodeLayout(12, ((3, 4),)), 2, **sizes)
    for weight in prior.trainable_weights:
        weight.assign(weight + 0.3 * keras.random.normal(weight.shape))
    tensors = read_safetensors(safetensors(prior_tensors(prior)))
    codes = np.random.default_rng(0).integers(0, 12, (2, 3, 4)).astype("int32")
    logits = prior({"codes": codes, "labels": np.array([1, 2], "int32")})  # 2 is no label
    for row, label in enumerate((1, 2)):
        wanted = llamagen(tensors, codes[row].ravel(), label, (4, 2, 8, (3, 4), 100.0))
        np.testing.assert_allclose(logits[row], wanted, atol=1e-4)
