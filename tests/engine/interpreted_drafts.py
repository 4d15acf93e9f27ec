# SPDX-License-Identifier: Apache-2.0
"""A program: an engine with V2's runner on CPU (see ``interpreted``) that drafts by a model; what it answered and
drafted, as JSON. Its arguments: ranks, model, configuration of drafts as JSON, file to write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.engine.harness import RESTLESS, Ask, Engine, prompt
from tests.engine.oracle import counted
from vllm_nanocp.entry import refusals

LENGTHS = [20, 47, 300, 530, 700, 610, 33]
LONGEST = 1024


def main(ranks: int, model: str, speculation: str, out: str) -> None:
    refused = "speculative decoding with the V2 model runner on CPU"
    refusals.SETTINGS = tuple(setting for setting in refusals.SETTINGS if setting.what != refused)
    nanocp = {"segment_size": 128, "moves": RESTLESS} if ranks > 1 else None
    latent: dict[str, Any] = {}
    if "deepseek" in json.loads((Path(model) / "config.json").read_text())["model_type"]:
        latent = dict(block_size=16, attention_config={"backend": "CPU_MLA"})
        if ranks == 1:
            # Stock vLLM cuts no prompts of latent attention on CPU into chunks.
            latent |= dict(worker_cls="tests.engine.repaired.Worker", max_num_batched_tokens=LONGEST)
    args = dict(num_gpu_blocks_override=256, max_model_len=LONGEST, max_num_batched_tokens=512)
    drafts = dict(worker_extension_cls="tests.engine.oracle.Oracle", speculative_config=json.loads(speculation))
    engine = Engine(model, ranks, nanocp, **(args | drafts | latent))
    try:
        engine.call(engine.llm.collective_rpc("note_drafts"))
        asks = [Ask(prompt(n, 61000 + i), dict(max_tokens=24 + 2 * i), delay=0.5 * i) for i, n in enumerate(LENGTHS)]
        answers = engine.ask([*asks, Ask(prompt(LONGEST - 6, 5), dict(max_tokens=6))])
        noted = engine.call(engine.llm.collective_rpc("noted_drafts"))
        counts = counted(engine)
        status = {}
        if ranks > 1:
            engine.check_nothing_left()
            found = engine.status()
            status = {name: found[name] for name in ("sharded_steps", "steps", "moves")}
        result = dict(
            tokens=[answer.tokens for answer in answers], drafts=[entry for rank in noted for entry in rank],
            accepted=counts["accepted"], status=status,
        )  # fmt: skip
        Path(out).write_text(json.dumps(result))
    finally:
        engine.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
