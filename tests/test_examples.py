# SPDX-License-Identifier: Apache-2.0
"""The demo's model computes what the dense one does, and the demo reads and judges what servers say."""

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import demo
import make_moe
import pytest


def tiny_llama() -> Any:
    """A random Llama with tied embeddings, as SmolLM2 has, and weights that bfloat16 holds exactly."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        rope_theta=100000.0,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def test_the_moe_computes_what_the_dense_model_does(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import MixtralForCausalLM

    dense = tiny_llama()
    weights = make_moe.moe_weights(dense.state_dict(), 2, 32, num_experts=4, seed=0)
    save_file(weights, tmp_path / make_moe.WEIGHTS_NAME, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(make_moe.moe_config(dense.config, 4, 2)))
    moe = MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(40)[None] % 64
    with torch.no_grad():
        torch.testing.assert_close(moe(tokens).logits, dense(tokens).logits, atol=1e-4, rtol=1e-4)


def test_the_router_uses_every_expert() -> None:
    import torch

    dense = tiny_llama().state_dict()
    first, again = (make_moe.moe_weights(dense, 2, 32, num_experts=4, seed=0) for _ in range(2))
    router = first["model.layers.0.block_sparse_moe.gate.weight"]
    assert torch.equal(router, again["model.layers.0.block_sparse_moe.gate.weight"])
    inputs = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    assert set((inputs @ router.float().T).topk(2).indices.flatten().tolist()) == {0, 1, 2, 3}


def test_a_model_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, *_: object) -> None:
        (folder / make_moe.WEIGHTS_NAME).touch()
        raise RuntimeError("disk full")

    monkeypatch.setattr(make_moe, "write_model", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        make_moe.make_moe(tmp_path / "models" / "m")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_finished_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, *_: object) -> None:
        (folder / make_moe.WEIGHTS_NAME).touch()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(make_moe, "write_model", write)
    target = make_moe.make_moe(tmp_path / "m")
    monkeypatch.setattr(make_moe, "write_model", lambda *_: pytest.fail("made again"))
    assert make_moe.make_moe(target) == target


LOG = """\
(EngineCore pid=12) INFO nanocp: request chatcmpl-a1-ff0 finished: KV tokens per rank [3200, 3099]
(EngineCore pid=12) INFO nanocp: request chatcmpl-b2-ee1 finished: KV tokens per rank [0, 6299]
INFO: something else
"""


def long_answer(request_id: str, token_ids: list[int] | None = None) -> demo.Answer:
    question = demo.Question("long", "Why?", "because", text="Once upon a time.")
    return demo.Answer(question, request_id, text="Just because.", token_ids=token_ids or [1, 2])


def test_held_tokens_come_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text(LOG)
    held = demo.held_tokens(log)
    assert held == {"chatcmpl-a1-ff0": [3200, 3099], "chatcmpl-b2-ee1": [0, 6299]}
    assert demo.spread_of(long_answer("chatcmpl-a1"), held) == [3200, 3099]


@pytest.mark.parametrize(
    ("request_id", "fine"), [("chatcmpl-a1", True), ("chatcmpl-b2", False), ("chatcmpl-c3", False)]
)
def test_a_long_request_on_one_rank_fails_the_demo(tmp_path: Path, request_id: str, fine: bool) -> None:
    log = tmp_path / "server.log"
    log.write_text(LOG)
    assert demo.report_spread([long_answer(request_id)], log) is fine


def test_other_tokens_or_none_fail_the_demo() -> None:
    assert demo.report_same([long_answer("a", [1, 2])], [long_answer("b", [1, 2])])
    assert not demo.report_same([long_answer("a", [1, 2])], [long_answer("b", [1, 3])])
    assert not demo.report_same([demo.Answer(long_answer("a").question)], [demo.Answer(long_answer("b").question)])


def test_the_long_questions_carry_the_whole_text() -> None:
    text = demo.TEXT.read_text(encoding="utf-8").strip()
    long = [question for questions in demo.rounds() for question in questions if question.long]
    assert len(long) == 2
    assert all(q.prompt == f"{text}\n\n{q.question}" for q in long)


def test_a_server_that_dies_is_reported_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "LOG_DIR", tmp_path / "logs")
    monkeypatch.setattr(demo.sys, "executable", "/bin/false")
    with pytest.raises(demo.DemoError, match="ended with exit code 1"), demo.server("bad", (), {}):
        pytest.fail("it never gets ready")


ERROR = '{"error": {"message": "too long by far"}}'


class _Failing(BaseHTTPRequestHandler):
    """A server that has a model, and answers with what ``server.reply`` says."""

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(*self.server.reply)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "reply",
    [
        (400, ERROR),
        (200, 'data: {"choices": [{"delta": {"content": "Four"}}]}\n\ndata: ' + ERROR + "\n\n"),
    ],
    ids=["refused", "in the stream"],
)
def test_a_long_question_that_fails_says_what_the_server_said(reply: tuple[int, str]) -> None:
    with HTTPServer(("127.0.0.1", 0), _Failing) as server:
        server.reply = reply  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, str(Path(demo.__file__).with_name("ask_long.py")), "--url", url, "--tokens", "10"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert done.returncode == 1
    assert "too long by far" in done.stderr and "Traceback" not in done.stderr
    assert ("Four" in done.stdout) == (reply[0] == 200)
