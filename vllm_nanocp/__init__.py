# SPDX-License-Identifier: Apache-2.0
"""Request-level context parallelism for Mixture-of-Experts serving with vLLM.

Importing this package imports neither torch nor vLLM and changes nothing. vLLM finds the plugin through the
entry point ``vllm.general_plugins`` (see ``plugin.register``); ``docs/design.md`` names the parts.
"""

__version__ = "0.2.0"
