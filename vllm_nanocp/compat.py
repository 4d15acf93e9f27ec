# SPDX-License-Identifier: Apache-2.0
"""The vLLM versions this plugin was read against and tested with."""

SUPPORTED = "0.32.0"
_FIRST = (0, 32, 0)
_NEXT = (0, 33, 0)


def _release(version: str) -> tuple[int, int, int] | None:
    """The leading ``X.Y.Z`` of a PEP 440 version, or None when there is none ("dev")."""
    parts: list[int] = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    if len(parts) < 2:
        return None
    return parts[0], parts[1], parts[2] if len(parts) > 2 else 0


def unsupported_reason(vllm_version: str) -> str | None:
    """Why ``--nanocp`` cannot be used with this vLLM, in one line; None when it can."""
    release = _release(vllm_version)
    if release is not None and _FIRST <= release < _NEXT:
        return None
    return (
        f"nanocp: vLLM {vllm_version} is not supported (supported: {SUPPORTED}); "
        f"install vllm=={SUPPORTED} or start without --nanocp"
    )
