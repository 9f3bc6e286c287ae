"""Packages vqbeam; the pinned versions are in constraints.txt."""

import pathlib

import setuptools

# Installed below `vqbeam`, since other projects have packages of these names too.
PACKAGES = setuptools.find_packages(include=["configs*", "vqvae*", "prior*", "pipelines*"])

setuptools.setup(
    name="vqbeam",
    version="0.1.0",
    description="Two-stage image generation, from a laptop to a cluster: VQ-VAE, prior and Beam",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["vqbeam", *(f"vqbeam.{package}" for package in PACKAGES)],
    package_dir={f"vqbeam.{package}": package.replace(".", "/") for package in PACKAGES},
    package_data={"vqbeam.pipelines.report": ["*.html"]},
    install_requires=[
        "apache-beam>=2.77",
        "etils[epath]",
        "huggingface_hub",
        "importlib_resources",  # tensorflow-datasets imports it and does not declare it
        "jinja2",
        "keras>=3.15",
        "keras-nlp>=0.32",
        "matplotlib",
        "numpy",
        "pillow>=11.3",
        "protobuf",
        "pyarrow",
        "tensorboard",
        "tensorflow>=2.21",
        "tensorflow-datasets>=4.9.10",
    ],
    extras_require={
        "completion": ["shtab"],
        "docs": ["furo", "myst-nb", "sphinx-autoapi", "sphinx-copybutton"],
        "formats": ["pillow-heif", "pillow-jxl-plugin"],  # HEIC and JPEG XL
        "gcp": ["apache-beam[gcp]>=2.77"],
        "hub": ["huggingface_hub"],  # which is always installed, since Keras needs it as well
        "jax": ["jax"],
        "studio": ["gradio>=6"],
        "test-browser": ["playwright"],
        "test-cloud": ["apache-beam[gcp]>=2.77", "gcp-storage-emulator", "trustme"],
        "test": [
            "ipykernel",
            "jax",
            "nbclient",
            "pandas",
            "pillow-heif",
            "pillow-jxl-plugin",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "shtab",
            "twine",
            "wandb",
            "webdataset",
        ],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["vqbeam = vqbeam.pipelines.cli.main:main"]},
)
