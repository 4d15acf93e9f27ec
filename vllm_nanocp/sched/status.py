# SPDX-License-Identifier: Apache-2.0
"""A look into the running scheduler, for tests and operators: free blocks, batches, shards.

Touches vLLM 0.32's ``EngineCore``: its clients can call any of its methods by name (``call_utility``), so one is
added there, in the process that runs the scheduler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .state import SchedulerState

METHOD = "nanocp_status"


def describe(scheduler: SchedulerState) -> dict[str, Any]:
    """Plain data: per-rank lists, and per-request maps by request id."""
    free_blocks = scheduler.free_blocks()
    views = [rank.view for rank in scheduler.ranks]
    return {
        "ranks": len(scheduler.ranks),
        "block_size": scheduler.block_size,
        "total_blocks": [view.total_blocks for view in views],
        "free_blocks": free_blocks,
        "running": [view.running for view in views],
        "waiting": [view.queued for view in views],
        "unplaced": len(scheduler.unplaced),
        "preemptions": scheduler.num_preemptions,
        "avoidable_preemptions": scheduler.num_avoidable_preemptions,
        "moves": scheduler.mover.num_moves,
        "spills": scheduler.mover.num_spills,
        "sharded_steps": scheduler.num_sharded_steps,
        "parallel_parts": scheduler.members.num_parallel_parts,
        "steps": scheduler.num_steps,
        "computed_tokens": scheduler.num_tokens,
        "sharded": {
            request_id: sharded.shard_map.tokens_by_rank(len(scheduler.ranks), sharded.num_computed_tokens)
            for request_id, sharded in scheduler.sharded.items()
        },
        "finished": dict(scheduler.finished_shares),
    }


def install() -> None:
    """Let clients of this process's engine call ``nanocp_status``. Idempotent."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, METHOD, lambda self: describe(self.scheduler))


def of_llm(llm: Any) -> dict[str, Any]:
    """Status of a ``vllm.LLM``'s engine. Blocks until the engine is between two steps."""
    status: dict[str, Any] = llm.llm_engine.engine_core.call_utility(METHOD)
    return status


async def of_async_llm(engine: Any) -> dict[str, Any]:
    """Status of an ``AsyncLLM``."""
    status: dict[str, Any] = await engine.engine_core.call_utility_async(METHOD)
    return status
