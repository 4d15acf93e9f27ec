# SPDX-License-Identifier: Apache-2.0
"""Real schedulers with virtual workers, which hand back a token for each request that has computed its prompt."""

from __future__ import annotations

import argparse
import cProfile
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from typing import Any

BLOCK = 32
WARM_UP = 30  # steps: all are prefilled and decode


def cpu_ms(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = call()
    return result, 1e3 * (time.process_time() - start)


def drop_output(path: str) -> None:
    """An API server that does nothing with what it is sent."""
    import zmq

    socket = zmq.Context().socket(zmq.PULL)
    socket.bind(path)
    while True:
        socket.recv_multipart()


def scheduler_args(args: argparse.Namespace, model: str, slots: int) -> dict[str, Any]:
    """What vLLM makes a scheduler from, and the plugin one over ``args.ranks`` ranks."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    settings = {"ranks": args.ranks, "segment_size": 1024, "parallel_prefill": args.ranks > 1, "moves": args.moves}
    config = EngineArgs(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=8192,
        max_num_batched_tokens=8192,
        max_num_seqs=slots,
        block_size=BLOCK,
        enable_expert_parallel=True,
        additional_config={"nanocp": settings | {"scheduler_processes": not args.in_process}},
    ).create_engine_config()
    config.scheduler_config.async_scheduling = True  # which vLLM does not do on CPU
    blocks = 20 * slots + 400
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    kv_cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)])
    sizes = dict(block_size=BLOCK, hash_block_size=BLOCK, log_stats=True)
    return dict(vllm_config=config, kv_cache_config=kv_cache, **sizes)


def make_requests(name: str, lengths: list[int]) -> list[Any]:
    """Requests that have nothing in common, for they are looked for in prefix caches; nobody finishes one."""
    from vllm import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    hasher = get_request_block_hasher(BLOCK, get_hash_fn_by_name("sha256"))
    requests = []
    for number, length in enumerate(lengths):
        params = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)
        prompt = [hash((name, number)) % 50_000, *((7 * k) % 256 for k in range(length - 1))]
        requests.append(Request(f"{name}-{number}", prompt, params, None, block_hasher=hasher))
    return requests


def answer(part: Any, computed: dict[str, int], prompts: dict[str, int]) -> Any:
    """A token for every request that has reached the end of its prompt.

    Args:
        part: vLLM's scheduler output.
        computed: tokens so far of requests that have not; kept up to date here.
        prompts: lengths of prompts; members of sharded requests have none, and what they sample is nobody's.
    """
    from vllm.v1.outputs import ModelRunnerOutput

    for new in part.scheduled_new_reqs:
        computed[new.req_id] = new.num_computed_tokens
    tokens = []
    for req_id, count in part.num_scheduled_tokens.items():
        if req_id in computed:
            computed[req_id] += count
            if computed[req_id] < prompts.get(req_id, 1 << 30):
                tokens.append([])
                continue
            del computed[req_id]
        tokens.append([5])
    ids = list(part.num_scheduled_tokens)
    return ModelRunnerOutput(ids, {req_id: n for n, req_id in enumerate(ids)}, tokens)


class Forked:
    """A scheduler's process, forked: a ``rank_process.Process``."""

    def __init__(self, theirs: Any) -> None:
        from vllm_nanocp.sched.rank import rank_process

        context = multiprocessing.get_context("fork")
        reads, writes = theirs
        self._process = context.Process(
            target=lambda: rank_process.run(os.dup(reads.fileno()), os.dup(writes.fileno())), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        return self._process.exitcode or 0

    def kill(self) -> None:
        self._process.kill()


class Engine:
    """What the ranks' sockets to the API servers know of the engine."""

    _weight_version = None
    engine_index = 0


class World:
    """A scheduler over all ranks and its virtual workers, one step in flight."""

    def __init__(self, args: argparse.Namespace, model: str, path: str, slots: int) -> None:
        from vllm.utils.gc_utils import freeze_gc_heap
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import init_none_hash
        from vllm.v1.structured_output import StructuredOutputManager

        from vllm_nanocp.sched.rank import rank_process
        from vllm_nanocp.sched.scheduler import NanoCPScheduler

        rank_process.start = Forked
        kwargs = scheduler_args(args, model, slots)
        init_none_hash(get_hash_fn_by_name("sha256"))
        freeze_gc_heap()
        self.scheduler = NanoCPScheduler(
            structured_output_manager=StructuredOutputManager(kwargs["vllm_config"]), **kwargs
        )
        self.engine = Engine()
        if not args.in_process:
            self.scheduler.outlets.note_paths(self.engine, [path])
        freeze_gc_heap()  # as the engine does
        self.prompts: dict[str, int] = {}
        self._computed: list[dict[str, int]] = [{} for _ in range(args.ranks)]
        self._flying: Any = None

    def add(self, requests: list[Any]) -> float:
        """Milliseconds."""
        self.prompts |= {request.request_id: request.num_prompt_tokens for request in requests}
        return cpu_ms(lambda: [self.scheduler.add_request(request) for request in requests])[1]

    def step(self, profile: cProfile.Profile | None = None) -> tuple[float, float, float]:
        """Milliseconds of ``schedule``, of pickling what goes to the workers, and of ``update_from_output``."""
        if profile is not None:
            profile.enable()
        output, schedule = cpu_ms(self.scheduler.schedule)
        if profile is not None:
            profile.disable()
        _, message = cpu_ms(lambda: pickle.dumps(output, -1))
        update = 0.0
        if self._flying is not None:
            flying, answers = self._flying
            if profile is not None:
                profile.enable()
            _, update = cpu_ms(lambda: self.scheduler.update_from_output(flying, answers))
            if profile is not None:
                profile.disable()
        self._flying = output, [self._answer(*at) for at in enumerate(output.parts)]
        return schedule, message, update

    @property
    def scheduled(self) -> int:
        """Tokens of the last step."""
        tokens: int = self._flying[0].total_num_scheduled_tokens
        return tokens

    def _answer(self, rank: int, part: Any) -> Any:
        from vllm_nanocp.step_messages import PackedOutput

        packed = isinstance(part.payload, bytes)
        made = answer(pickle.loads(part.payload) if packed else part.payload, self._computed[rank], self.prompts)
        return PackedOutput.of(made) if packed else made

    def fill(self, ranks: int, shorts: int, sharded: int) -> None:
        """Let so many short and sharded requests a rank decode."""
        self.add(make_requests("long", [3000 + 10 * (i % 100) for i in range(sharded * ranks)]))
        for _ in range(6):
            self.step()
        self.add(make_requests("short", [40 + i % 100 for i in range(shorts * ranks)]))
        self.step()
        while self.scheduler.get_request_counts()[1]:  # so many start in a step
            self.step()
        for _ in range(WARM_UP):
            self.step()
        assert self.scheduled == (shorts + sharded) * ranks, self.scheduled
        counts = self.scheduler.get_request_counts()
        assert counts == ((shorts + sharded) * ranks, 0), counts
        assert len(self.scheduler.sharded) >= sharded * ranks, len(self.scheduler.sharded)
        assert all(s.at_home for s in self.scheduler.sharded.values())
