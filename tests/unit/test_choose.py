# SPDX-License-Identifier: Apache-2.0
"""Which exchange is used, and whether GPUs are taken to reach each other."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.unit.processes import run_ranks
from vllm_nanocp.errors import NanoCPConfigError
from vllm_nanocp.exchange import symmetric
from vllm_nanocp.exchange.choose import choose


@pytest.mark.parametrize(
    ("wanted", "problem", "name"),
    [
        ("auto", "", "routed"),
        ("auto", "ranks are on several machines", "collective"),
        ("collective", "", "collective"),
        ("collective", "ranks are on several machines", "collective"),
        ("routed", "", "routed"),
    ],
)
def test_choice(wanted: str, problem: str, name: str) -> None:
    found, reason = choose(wanted, problem)
    assert found == name
    assert reason and (not problem or wanted == "collective" or problem in reason)


def test_what_was_asked_for_and_cannot_be_is_refused() -> None:
    with pytest.raises(NanoCPConfigError, match="several machines; use 'auto' or 'collective'"):
        choose("routed", "ranks are on several machines")


def test_gpus_that_a_process_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA is not asked about a number that is not another GPU of this process."""
    asked: list[tuple[int, int]] = []

    def can_access(device: int, peer: int) -> bool:
        asked.append((device, peer))
        return True

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", can_access)
    assert symmetric._can_access(0, 1)
    assert not symmetric._can_access(0, 0)
    assert not symmetric._can_access(0, 2)
    assert asked == [(0, 1)]


def _reachable(rank: int, size: int, linked: bool, alone: bool) -> str:
    """What a rank finds, with vLLM and CUDA answering as told."""
    from vllm.platforms import current_platform

    kind = type(current_platform)
    kind.visible_device_id_to_physical_device_id = classmethod(lambda _, index: rank)  # type: ignore[assignment]
    kind.is_fully_connected = classmethod(lambda _, numbers: linked and numbers == [0, 1])  # type: ignore[attr-defined]
    torch.cuda.device_count = lambda: 1 if alone else size
    torch.cuda.can_device_access_peer = lambda device, peer: True
    assert dist.group.WORLD is not None
    return symmetric.reachable(torch.device("cuda", 0 if alone else rank), dist.group.WORLD)


@pytest.mark.parametrize(
    ("linked", "alone", "found"),
    [
        (True, False, ""),
        (False, False, "the ranks' GPUs are not all linked by NVLink"),
        (True, True, "GPU 0 cannot reach the memory of GPU 1"),
    ],
)
def test_reachable(linked: bool, alone: bool, found: str) -> None:
    """All ranks find the same; one that sees its own GPU only reaches no other."""
    assert run_ranks(2, _reachable, linked, alone, seconds=60) == [found, found]
