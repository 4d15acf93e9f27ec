# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM that this package and its patches wrap, replace, subclass, call or read, and what it looked like.

``ours`` finds in this package's source what is imported and what is done with it; ``instances.json`` and ``by_hand``
have the attributes of vLLM's objects, which no import tells of; ``theirs`` reads a vLLM, a wheel or a folder, as text;
``manifest`` puts both together, next to ``record.json``, which has what the names were in the versions that were read.

    python -m vllm_nanocp.vllm_touch X.Y.Z    # what of it is not as recorded in that release

Nothing here imports vLLM or torch.
"""
