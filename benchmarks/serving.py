# SPDX-License-Identifier: Apache-2.0
"""What benchmarks drive: a model folder and ``vllm serve`` processes. ``streams.py`` has the requests to them."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from shapes import SHAPES, config_of

ENDINGS = (signal.SIGINT, signal.SIGTERM)
PROBE_LIMIT_S = 180.0
STOP_LIMIT_S = 20.0
KILL_LIMIT_S = 20.0
PROBE = """
import importlib.metadata, json, platform, torch, vllm
cuda = torch.cuda.is_available()
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else None
versions = {"vllm": vllm.__version__, "torch": torch.__version__, "cuda": torch.version.cuda, "nccl": nccl}
print(json.dumps({"gpu": gpus[0] if gpus else None, "gpus": len(gpus), "machine": platform.machine(),
                  "versions": {**versions, "python": platform.python_version()}}))
"""
# vLLM's own DecodeBenchConnector, which leaves alone the requests that want their prompts computed.
_CONNECTOR = {"kv_connector": "PartlyFilled", "kv_connector_module_path": "partly_filled", "kv_role": "kv_both"}
# What a server's log says of the KV a rank holds, of how long requests were spread, and of why it did not start.
NOTES = re.compile(
    r"(ValueError: |KV cache size|KV tokens per rank|Maximum concurrency|Available KV cache memory|"
    r"Graph capturing finished|nanocp: exchange).*"
)


def connector(fill: float) -> str:
    """The value of ``--kv-transfer-config`` with which stock vLLM takes prompts as computed, as the plugin does.

    The cache is filled once, at start: filling the blocks of each request in the step that schedules it takes time that
    no computed, transferred or cached prompt takes there (0.5 us a token on an H200).
    """
    return json.dumps(_CONNECTOR | {"kv_connector_extra_config": {"fill_mean": fill, "startup_fill": True}})


def names(allowed: Sequence[str]) -> Any:
    """An argparse type: a list with commas, of these names."""

    def parse(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",") if name.strip()]
        if not found or not set(found) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text!r}: use some of {','.join(allowed)}")
        return found

    return parse


def probe() -> dict[str, Any]:
    """Versions and GPUs. In a process of its own: a CUDA context here would take memory from a rank."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_LIMIT_S, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"vLLM or torch cannot be imported:\n{result.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def write_model(folder: Path, shape: str = SHAPES[0]) -> None:
    """A folder of a model's shape with a byte-level tokenizer and no weights, for ``--load-format dummy``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = config_of(shape)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    end = "<|endoftext|>"
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {end: 256} | {f"Ġt{i}": i for i in range(257, config["vocab_size"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def system_flags(args: argparse.Namespace, system: str, gpu: bool, bench: bool) -> list[str]:
    """The flags in which the systems differ."""
    # Data-parallel experts do not exist in stock vLLM for CPU.
    flags = [f"--data-parallel-size={args.ranks}", "--enable-expert-parallel"]
    if system == "stock":
        flags = flags if gpu else ["--data-parallel-size=1"]
        if bench:
            flags += ["--kv-transfer-config", connector(args.fill)]
        return flags
    moves = system == "moves"
    exchange = ("routed" if gpu else "collective") if moves else system
    config: dict[str, Any] = {"exchange": exchange, "segment_size": args.segment_size, "moves": moves}
    if bench:
        config["decode_bench"] = True
    config |= args.settings
    return [*flags, "--nanocp", "--nanocp-config", json.dumps(config)]


def trace_folder(args: argparse.Namespace, system: str) -> str:
    """Where the workers of a system leave their profiler's traces."""
    return str((args.out / f"{system}-traces").resolve())


def serve_command(args: argparse.Namespace, system: str, gpu: bool, bench: bool, length: int, port: int) -> list[str]:
    """The whole command line; without a GPU eager, and without what concerns graphs and memory."""
    flags = [
        "--load-format=dummy",
        f"--max-model-len={length}",
        "--no-enable-prefix-caching",
        f"--max-num-seqs={args.max_num_seqs}",
        f"--max-num-batched-tokens={args.max_num_batched_tokens}",
        *system_flags(args, system, gpu, bench),
    ]
    if "trace" in args.scenarios:
        profiler = {"profiler": "torch", "torch_profiler_dir": trace_folder(args, system), "ignore_frontend": True}
        flags.append(f"--profiler-config={json.dumps(profiler | {'torch_profiler_with_stack': False})}")
    if gpu:
        flags.append(f"--gpu-memory-utilization={args.gpu_memory_utilization}")
        if args.capture_sizes != "default":
            flags.append(f"-cc.cudagraph_capture_sizes=[{args.capture_sizes}]")
    else:
        flags.append("--enforce-eager")
    place = ["--host", "127.0.0.1", f"--port={port}"]
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    return [*vllm, str(args.model), *flags, *shlex.split(args.extra), *place]


def environment(system: str, gpu: bool, bench: bool, fill: float = 0.015) -> dict[str, str]:
    """What is set for a server besides what it inherits; ``fill``: the KV of prompts that are taken as computed."""
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if not gpu:
        cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        env |= {key: os.environ.get(key, value) for key, value in cpu.items()}
    if system == "stock":
        # No plugin but the one without which the command does not start on CPU.
        env["VLLM_PLUGINS"] = "nanocp_metadata_alias"
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    elif bench:
        env |= {"NANOCP_DECODE_BENCH": "1", "NANOCP_DECODE_BENCH_KV": str(fill)}
    return env


def end(number: int, _: Any) -> None:
    """A handler that ends this program, once: a second signal must not cut short the stopping of its server."""
    for other in ENDINGS:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


class ServerError(RuntimeError):
    """The server did not come up, or ended too soon."""


class Server:
    """A ``vllm serve`` process in a session of its own; ``seconds`` is the time to its first healthy answer."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.seconds: float | None = None
        self._started = time.monotonic()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        if self.healthy():
            raise ServerError(f"another server answers at {self.url}")
        # A key in the environment would make the server refuse this client.
        inherited = {key: value for key, value in os.environ.items() if key != "VLLM_API_KEY"}
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                env={**inherited, **env},
            )

    def healthy(self) -> bool:
        try:
            with self._opener.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def wait(self, limit: float) -> float:
        """Seconds until it is healthy; raises ``ServerError`` with the end of its log when it will not be."""
        while not self.healthy():
            waited = time.monotonic() - self._started
            if self.process.poll() is not None:
                raise ServerError(f"the server ended with code {self.process.returncode}:\n{self.tail()}")
            if waited > limit:
                raise ServerError(f"the server was not ready after {limit:.0f} s:\n{self.tail()}")
            time.sleep(0.2)
        self.seconds = round(time.monotonic() - self._started, 1)
        return self.seconds

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def notes(self) -> list[str]:
        """What the log says about capacity and spreading: the first and the last such lines."""
        found = [match.group(0) for match in NOTES.finditer(self.log.read_text(errors="replace"))]
        return found if len(found) <= 40 else found[:20] + found[-20:]

    def members(self) -> list[psutil.Process]:
        """All processes of its session, and their descendants, should one have left the session."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid:
                    found[process.pid] = process
                    found.update({child.pid: child for child in process.children(recursive=True)})
        return list(found.values())

    def stop(self) -> None:
        """SIGINT, then SIGKILL for all that is left; returns when nothing of it runs, so that memory is free again."""
        members = self.members()
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(STOP_LIMIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            members = list({process.pid: process for process in members + self.members()}.values())
            for process in members:
                with contextlib.suppress(psutil.Error):
                    process.kill()  # psutil does not kill another process that got the same id
            self.process.wait(KILL_LIMIT_S)
            _, alive = psutil.wait_procs(members, KILL_LIMIT_S)
            if alive:
                print(f"still running after SIGKILL: {[process.pid for process in alive]}", file=sys.stderr)


@contextlib.contextmanager
def running(command: Sequence[str], env: Mapping[str, str], port: int, log: Path) -> Iterator[Server]:
    """The server for the body of the ``with``, which must call ``wait``."""
    server = Server(command, env, port, log)
    try:
        yield server
    finally:
        server.stop()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace the file at once, for a killed run must not leave half of it; lists of numbers take one line."""
    text = json.dumps(content, indent=1)
    new = path.with_suffix(".tmp")
    new.write_text(re.sub(r"\[[\d\s.,-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n")
    new.replace(path)
