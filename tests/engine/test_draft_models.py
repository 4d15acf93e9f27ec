# SPDX-License-Identifier: Apache-2.0
"""Draft models beside EAGLE3 (``test_speculation.py``), and drafts against stock vLLM's. Engines of their own, so only
where ``NANOCP_DRAFT_MODELS`` is set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_drafts import drafts, make_deepseek_v3, make_eagle, make_first_order, make_glm4_moe

from .conftest import SMALL_BLOCKS
from .harness import RESTLESS, Ask, Engine, prompt
from .oracle import counted

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif("NANOCP_DRAFT_MODELS" not in os.environ, reason="NANOCP_DRAFT_MODELS is not set"),
]

MOST = 3
RANKS = 3
FOLDER = Path(__file__).parent
LENGTHS = [20, 47, 300, 530, 700, 1000, 600, 100, 33, 520, 310, 1600]


@contextmanager
def engine(model: Any, ranks: int, speculation: dict[str, Any] | None, **args: Any) -> Iterator[Engine]:
    if speculation is not None:
        args |= dict(speculative_config=speculation, worker_extension_cls="tests.engine.oracle.Oracle")
    if ranks == 1 and args.get("attention_config") == LATENT["attention_config"]:
        args |= dict(worker_cls="tests.engine.repaired.Worker")  # eager latent attention is wrong without
    made = Engine(str(model), ranks, **args)
    try:
        if speculation is not None:
            made.call(made.llm.collective_rpc("note_drafts"))
        yield made
    finally:
        made.close()


def stock_args() -> dict[str, Any]:
    return dict(max_num_batched_tokens=1 << 13, num_gpu_blocks_override=4096)


def noted(running: Engine) -> dict[tuple[tuple[int, ...], int], list[int]]:
    """Drafts, by the first tokens of a prompt and how many tokens the request had."""
    ranks = running.call(running.llm.collective_rpc("noted_drafts"))
    return {(tuple(stem), at): made for rank in ranks for stem, at, made in rank}


def accepted(running: Engine) -> int:
    counts = counted(running)
    return counts["accepted"]


def asks(first: int, tokens: int) -> list[Ask]:
    return [Ask(prompt(n, first + i), dict(max_tokens=tokens + 3 * i), delay=0.05 * i) for i, n in enumerate(LENGTHS)]


# Of vLLM's kernel for latents, the only size and the only backend.
LATENT: dict[str, Any] = dict(block_size=16, attention_config={"backend": "CPU_MLA"})


@pytest.mark.parametrize("method", ["eagle", "mtp", "latent mtp"])
def test_most_drafts_are_right(method: str, tmp_path: Path) -> None:
    """Of a target whose layers count little, and of what knows this much: an EAGLE head, or an MTP layer with experts
    that the ranks share, of grouped-query attention or latent. Homes move and ranks run full."""
    args = LATENT if method == "latent mtp" else {}
    if method.endswith("mtp"):
        target = (make_deepseek_v3 if args else make_glm4_moe)(tmp_path / "target")
        speculation: dict[str, Any] = dict(method="mtp", num_speculative_tokens=MOST)
    else:
        target = make_first_order(tmp_path / "target")
        speculation = drafts(make_eagle(tmp_path / "head"), "eagle", MOST)
    wanted = asks(60000, 40)
    with engine(target, 1, None, **stock_args(), **args) as stock:
        theirs = stock.ask(wanted)
    with engine(target, 1, speculation, **stock_args(), **args) as stock:
        assert [a.tokens for a in stock.ask(wanted)] == [a.tokens for a in theirs]
        by_stock = accepted(stock)
    blocks = SMALL_BLOCKS * (2 if args else 1)  # half as large
    small = args | dict(num_gpu_blocks_override=blocks, max_model_len=3000, enable_prefix_caching=True)
    config = {"segment_size": 512, "moves": RESTLESS | {"reserve_blocks": 0}}
    with engine(target, RANKS, speculation, nanocp=config, **small) as nanocp:
        ours = nanocp.ask(wanted)
        nanocp.check_nothing_left()
        status, ours_accepted = nanocp.status(), accepted(nanocp)
    made = sum(len(a.tokens[0]) for a in theirs)
    print(f"{method}: {made} tokens; accepted by stock {by_stock}, over ranks {ours_accepted}; {status}")
    assert [a.tokens for a in ours] == [a.tokens for a in theirs]
    assert status["sharded_steps"] and status["moves"] + status["spills"]
    assert by_stock > made / 3 and ours_accepted > 0.9 * by_stock


@pytest.mark.parametrize("method", ["eagle3", "latent mtp"])
def test_drafts_are_stocks(method: str, tiny_model: str, tiny_eagle3: str, tmp_path: Path) -> None:
    """A random head's attention is peaked, and a random MTP layer's: a draft that lacks a key is another one."""
    target, speculation, args = tiny_model, drafts(tiny_eagle3, "eagle3", MOST), {}
    if method == "latent mtp":
        target, args = str(make_deepseek_v3(tmp_path, faint=False)), LATENT
        speculation = dict(method="mtp", num_speculative_tokens=MOST)
    wanted = asks(61000, 40)
    with engine(target, 1, speculation, **stock_args(), **args) as stock:
        theirs, expected = stock.ask(wanted), noted(stock)
    with engine(target, 2, speculation, nanocp={"segment_size": 256, "moves": RESTLESS}, **args) as nanocp:
        ours, found = nanocp.ask(wanted), noted(nanocp)
        nanocp.check_nothing_left()
        status = nanocp.status()
    assert [a.tokens for a in ours] == [a.tokens for a in theirs]
    assert status["sharded_steps"] and status["moves"]
    both = expected.keys() & found.keys()
    same = [sum(found[key][i] == expected[key][i] for key in both) / len(both) for i in range(MOST)]
    print(f"{len(both)} places of {len(expected)} and {len(found)}; the same drafts: {same}; {status}")
    assert len(both) > 300
    assert same[0] > 0.99 and min(same) > 0.9, same  # near a block's end a later one may lack an earlier one's key


def interpreted(ranks: int, model: Any, speculation: dict[str, Any], out: Path) -> dict[str, Any]:
    """What an engine with V2's runner answers and drafts; in a process where vLLM finds what this runner asks for."""
    path = os.pathsep.join(map(str, (FOLDER / "interpreted", FOLDER.parents[1])))
    program = [sys.executable, "-m", "tests.engine.interpreted_drafts", str(ranks), str(model), json.dumps(speculation)]
    environment = os.environ | {"PYTHONPATH": path, "VLLM_USE_V2_MODEL_RUNNER": "1"}
    subprocess.run([*program, str(out)], check=True, env=environment, timeout=400)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["eagle3", "eagle", "mtp", "latent mtp"])
def test_drafts_of_the_v2_runner_are_stocks(method: str, tiny_model: str, tiny_eagle3: str, tmp_path: Path) -> None:
    """Async scheduling, as on GPUs; homes may move, ranks are idle, a request ends where any must. By a random head,
    and by what is right most of the time."""
    if method.endswith("mtp"):
        target: Any = (make_glm4_moe if method == "mtp" else make_deepseek_v3)(tmp_path / "target")
        speculation: dict[str, Any] = dict(method="mtp", num_speculative_tokens=MOST)
    elif method == "eagle":
        target = make_first_order(tmp_path / "target")
        speculation = drafts(make_eagle(tmp_path / "head"), "eagle", MOST)
    else:
        target, speculation = tiny_model, drafts(tiny_eagle3, "eagle3", MOST)
    theirs, ours = (interpreted(n, target, speculation, tmp_path / f"{n}.json") for n in (1, 2))
    assert ours["tokens"] == theirs["tokens"]
    by_stock, found = ({(tuple(stem), at): made for stem, at, made in one["drafts"]} for one in (theirs, ours))
    both = by_stock.keys() & found.keys()
    same = [sum(found[key][i] == by_stock[key][i] for key in both) / len(both) for i in range(MOST)]
    accepted, status = (theirs["accepted"], ours["accepted"]), ours["status"]
    print(
        f"{method}: {len(both)} places of {len(by_stock)} and {len(found)}; same {same}; accepted {accepted}; {status}"
    )
    assert len(both) > 50 and same[0] > 0.99 and min(same) > 0.9
    assert status["sharded_steps"] > 10
    assert accepted[1] >= 0.9 * accepted[0] and (method == "eagle3" or accepted[0] > 100)
