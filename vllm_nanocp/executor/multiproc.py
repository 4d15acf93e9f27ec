# SPDX-License-Identifier: Apache-2.0
"""N x TP workers in one world under one engine. Touches vLLM 0.32's ``MultiprocExecutor``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from copy import copy
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.network_utils import get_open_ports_list
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from .. import config as nanocp_config
from .. import patches
from ..patches.queue_names import unlink
from ..sched.rank import rank_process
from ..step_messages import NanoCPGrammarOutput
from . import longest_request
from .replies import Replies

if TYPE_CHECKING:
    _Base = MultiprocExecutor
else:
    _Base = object

# vLLM takes one port for each process group that its workers build for data parallelism, and some to spare.
NUM_PORTS = 5
# How long workers have to end by themselves after one of them has failed; the front-end gives the engine 5 seconds.
_FAILED_GRACE_S = 2.0


class RankGather:
    """Picks each rank's answer out of all workers'. Has the shape of vLLM's output aggregators."""

    def __init__(self, workers_per_rank: int) -> None:
        self.stride = workers_per_rank

    def aggregate(self, outputs: Sequence[Any], output_rank: int = 0) -> list[Any] | None:
        """One output a rank, from its first worker; None when the ranks wait for ``sample_tokens``."""
        parts = list(outputs[:: self.stride])
        return None if any(part is None for part in parts) else parts


class OneWorld(_Base):
    """Mixed into vLLM's executor: its world spans all ranks, and a step's result is one output a rank."""

    # Steps whose answers are awaited later: those that are in flight, and those that failed.
    _steps: Sequence[Future[Any]] = ()

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        # The world of all ranks is the workers' matter. The engine tells front-ends of one rank's, and a front-end in
        # its process has the same object.
        patches.apply_all(patches.CONFIG_PATCHES)  # the engine checks its configuration again after this
        vllm_config = copy(vllm_config)
        vllm_config.parallel_config = copy(vllm_config.parallel_config)
        super().__init__(vllm_config, *args, **kwargs)

    def _get_parallel_sizes(self) -> tuple[int, int, int]:
        config = nanocp_config.of(self.vllm_config)
        longest_request.install(config.degree_limit)
        parallel = self.parallel_config
        parallel.world_size = parallel.tensor_parallel_size * config.ranks
        parallel._data_parallel_master_port_list = get_open_ports_list(NUM_PORTS)
        tp_size, pp_size, pcp_size = super()._get_parallel_sizes()
        self.rank_gather: Any = RankGather(tp_size)
        rank_process.launch(config.ranks if config.scheduler_processes else 0, self._end_with_a_scheduler)
        return tp_size * config.ranks, pp_size, pcp_size

    def _end_with_a_scheduler(self) -> None:
        """A rank's scheduler process has died: end as when a worker has."""
        self.is_failed = True
        self.shutdown()
        callback, self.failure_callback = self.failure_callback, None
        if callback is not None:
            callback()

    def _post_init_executor(self) -> None:
        super()._post_init_executor()
        # All workers are connected to it. A name would stay if this process were killed with its resource tracker.
        queue = self.rpc_broadcast_mq
        if queue is not None:  # else a worker has died meanwhile, and all is shut down
            unlink(queue)
        self.response_mqs = Replies(self.response_mqs)  # type: ignore[assignment]

    def collective_rpc(  # type: ignore[override]
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        **answering: Any,
    ) -> Any:
        """As vLLM's. A call that is waited for comes behind the steps in flight: where one of these has failed, a rank
        hangs in it and answers nothing more, while the others may do well what is asked.

        Raises:
            RuntimeError: a worker fails, in this call or in a step before it.
        """
        answer = super().collective_rpc(method, timeout, args, kwargs, True, **answering)
        if non_block:
            self._steps = [*(step for step in self._steps if not step.done() or step.exception()), answer]
            return answer
        for step in self._steps:
            step.result()
        return answer.result()

    def execute_model(  # type: ignore[override]
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> list[ModelRunnerOutput] | None | Future[list[ModelRunnerOutput] | None]:
        return self.collective_rpc(
            "execute_model",
            args=(scheduler_output,),
            unique_reply_rank=0,
            non_block=non_block,
            timeout=envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
            kv_output_aggregator=self.rank_gather,
        )

    def sample_tokens(  # type: ignore[override]
        self, grammar_output: NanoCPGrammarOutput | None, non_block: bool = False
    ) -> list[ModelRunnerOutput] | Future[list[ModelRunnerOutput]]:
        return self.collective_rpc(
            "sample_tokens",
            args=(grammar_output,),
            unique_reply_rank=0,
            non_block=non_block,
            timeout=envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
            kv_output_aggregator=self.rank_gather,
        )

    def take_draft_token_ids(self) -> list[DraftTokenIds | None]:  # type: ignore[override]
        """What each rank has drafted in the last step, from its first worker."""
        limit = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
        answers: list[DraftTokenIds | None] = self.collective_rpc("take_draft_token_ids", timeout=limit)
        return answers[:: self.rank_gather.stride]


class NanoCPMultiprocExecutor(OneWorld, MultiprocExecutor):
    """The executor for ranks that are processes of this machine."""

    def _init_executor(self) -> None:
        parallel, api_servers = self.parallel_config, self.parallel_config._api_process_count
        if current_platform.is_cpu():
            # vLLM takes it for the number of engines, which share the cores (``OMPProcessManager``).
            parallel._api_process_count = 1
        try:
            super()._init_executor()
        finally:
            parallel._api_process_count = api_servers

    def _ensure_worker_termination(self, worker_procs: list[BaseProcess]) -> None:  # type: ignore[override]
        """End the workers; those that hang because one of them has failed, soon.

        vLLM kills them after 9 seconds, but the front-end kills this process 5 seconds after it has heard of the
        failure, and a worker that is stopped or waits in a collective would be left on the machine.
        """
        if self.is_failed or getattr(getattr(self, "response_mqs", None), "incomplete", False):
            end = time.monotonic() + _FAILED_GRACE_S
            while any(process.is_alive() for process in worker_procs) and time.monotonic() < end:
                time.sleep(0.05)
            for process in worker_procs:
                if process.is_alive():
                    process.kill()
        super()._ensure_worker_termination(worker_procs)
