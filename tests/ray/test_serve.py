# SPDX-License-Identifier: Apache-2.0
"""``examples/ray/domains.yaml``: parsed as it is, and run on CPU with a tiny model in the place of the real one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

pytest.importorskip("ray.serve")

from tests.server.serving import free_port, wait_for

from .nodes import Nodes

pytestmark = pytest.mark.engine

FOLDER = Path(__file__).parents[2] / "examples" / "ray"
START_LIMIT_S = 400.0
CALLED = r"domains_Domain (\w+) \S+ -- CALL forward OK"
CPU_FLAGS = [
    "--data-parallel-size=2", "--enable-expert-parallel", "--nanocp", '--nanocp-config={"segment_size": 512}',
    "--distributed-executor-backend=ray", "--enforce-eager", "--dtype=float32", "--max-model-len=4096",
    "--block-size=32", "--num-gpu-blocks-override=160", "--served-model-name=tiny", "--enable-prompt-tokens-details",
]  # fmt: skip


def example() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "domains.yaml").read_text())
    return found


def test_yaml_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Serve's own schema; its arguments are those of the application, its flags those of vLLM and this package."""
    from ray.serve.schema import ServeDeploySchema
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.syspath_prepend(str(FOLDER))
    import serve_domains

    config = ServeDeploySchema.model_validate(example())
    (application,) = config.applications
    settings = serve_domains.Settings(**application.args)
    names = {deployment.name for deployment in application.deployments}
    assert names == {serve_domains.Domain.name, serve_domains.Endpoint.name}
    args = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(
        ["--model", settings.model, *settings.flags]
    )
    assert args.nanocp and args.data_parallel_size == 8 and args.distributed_executor_backend == "ray"


@pytest.fixture
def endpoint(tiny_model: str, nodes: Nodes, tmp_path: Path) -> Iterator[tuple[httpx.Client, Path]]:
    """The example with two domains of two ranks, on the nodes' CPUs."""
    config, port = example(), free_port()
    config["http_options"] = dict(host="127.0.0.1", port=port)
    (application,) = config["applications"]
    application["args"] |= dict(model=tiny_model, flags=CPU_FLAGS, start_limit_s=START_LIMIT_S)
    for deployment in application["deployments"]:
        deployment["ray_actor_options"] = dict(num_cpus=0)
    (tmp_path / "domains.yaml").write_text(yaml.safe_dump(config))
    log = tmp_path / "serve.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            ["serve", "run", str(tmp_path / "domains.yaml"), "--working-dir", "."],
            cwd=FOLDER,
            executable=str(Path(sys.executable).parent / "serve"),
            env={**os.environ, "RAY_ADDRESS": nodes.address, "VLLM_LOGGING_LEVEL": "INFO"},
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)

    def ready() -> bool:
        said = log.read_text(errors="replace")
        failed = "failed with exception" in said or "Failed to update the deployments" in said
        assert process.poll() is None and not failed, said[-4000:]
        try:
            return client.get("/v1/models", timeout=5).status_code == 200 and len(nodes.all_workers()) == 4
        except httpx.HTTPError:
            return False

    try:
        wait_for("both domains are ready", ready, START_LIMIT_S, 1.0)
        yield client, log
    finally:
        client.close()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        wait_for("no worker is left", lambda: not nodes.all_workers(), 60)


@pytest.mark.timeout(700)  # two servers with two ranks each start
def test_domains_behind_one_endpoint(endpoint: tuple[httpx.Client, Path]) -> None:
    """Requests at once go to both domains, one that starts like another to the domain of that; answers stream."""
    client, log = endpoint
    stems = ["".join(chr(97 + (i * k) % 26) for i in range(1100)) for k in (3, 5, 7, 11)]
    prompts: list[str] = []

    def ask(prompt: str, **body: Any) -> dict[str, Any]:
        fields = dict(model="tiny", prompt=prompt, max_tokens=4, temperature=0, ignore_eos=True, **body)
        answer = client.post("/v1/completions", json=fields)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    answers: list[dict[str, Any]] = []
    seen: list[str] = []

    def both_have_answered() -> bool:
        # Others each time: those that one domain knows would go there again.
        prompts[:] = [f"{len(seen)} {stem}" for stem in stems]
        seen.append(prompts[0])
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers[:] = pool.map(ask, prompts)
        return len(set(re.findall(CALLED, log.read_text(errors="replace")))) == 2

    # The second one may still start.
    wait_for("both domains have answered", both_have_answered, START_LIMIT_S, 1.0)
    again = [ask(prompt + " and on") for prompt in prompts]
    cached = [a["usage"].get("prompt_tokens_details") or {} for a in again]
    assert all(a["choices"][0]["text"] for a in answers)
    assert all(found.get("cached_tokens", 0) >= 512 for found in cached), cached
    fields = dict(model="tiny", prompt=prompts[0], max_tokens=8, temperature=0, ignore_eos=True, stream=True)
    with client.stream("POST", "/v1/completions", json=fields) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]" and len(lines) > 4
    text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
    assert text.startswith(answers[0]["choices"][0]["text"])
    assert client.post("/v1/completions", json=dict(model="none", prompt="a")).status_code == 404
