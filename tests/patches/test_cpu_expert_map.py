# SPDX-License-Identifier: Apache-2.0
"""`cpu_expert_map`: vLLM's own CPU kernel against a float64 reference, with the experts split over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_nanocp.patches import Outcome, PatchError, cpu_expert_map

pytest.importorskip("vllm")
HIDDEN, INNER, EXPERTS = 64, 32, 8
Kernel = Callable[..., torch.Tensor]


@pytest.fixture
def cpu_moe(on_cpu: None, stock: Any) -> Any:
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    stock(cpu_moe.CPUUnquantizedExperts, "apply")
    for name in cpu_expert_map._QUANTIZED:
        stock(getattr(cpu_moe, name), "_supports_parallel_config")
    return cpu_moe


@pytest.fixture
def patched(cpu_moe: Any) -> Any:
    assert cpu_expert_map.apply() is Outcome.APPLIED
    return cpu_moe


@dataclass
class _Layer:
    """One MoE layer: all experts' weights, and the kernel over any part of them."""

    module: Any
    activation: str
    dtype: torch.dtype
    w13: torch.Tensor
    w2: torch.Tensor
    b13: torch.Tensor | None
    b2: torch.Tensor | None

    def run(
        self,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        experts: torch.Tensor | None = None,
        on_input: bool = False,
    ) -> torch.Tensor:
        """The kernel with the experts of the global ids `experts` only; all of them without."""
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig, biased_moe_quant_config

        expert_map = None
        local = torch.arange(EXPERTS) if experts is None else experts
        if experts is not None:
            expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
            expert_map[local] = torch.arange(len(local), dtype=torch.int32)
        cls = self.module.CPUUnquantizedExperts
        kernel = cls.__new__(cls)
        kernel._use_zentorch = False
        kernel.quant_config = (
            FusedMoEQuantConfig.make()
            if self.b13 is None or self.b2 is None
            else biased_moe_quant_config(self.b13[local].contiguous(), self.b2[local].contiguous())
        )
        output = torch.full((len(hidden), HIDDEN), torch.nan, dtype=self.dtype)
        kernel.apply(
            output=output,
            hidden_states=hidden,
            w1=ops.cpu_prepack_moe_weight(self.w13[local].contiguous(), "vec"),
            w2=ops.cpu_prepack_moe_weight(self.w2[local].contiguous(), "vec"),
            topk_weights=weights.clone(),
            topk_ids=ids,
            activation=MoEActivation(self.activation),
            global_num_experts=EXPERTS,
            expert_map=expert_map,
            a1q_scale=None,
            a2_scale=None,
            workspace13=output,
            workspace2=output,
            expert_tokens_meta=None,
            apply_router_weight_on_input=on_input,
        )
        return output

    def reference(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """All experts in float64, one (token, slot) pair after the other."""
        result = torch.zeros(len(hidden), HIDDEN, dtype=torch.float64)
        for token, slot in torch.cartesian_prod(torch.arange(len(hidden)), torch.arange(ids.shape[1])):
            expert = ids[token, slot]
            inner = self.w13[expert].double() @ hidden[token].double()
            inner += 0 if self.b13 is None else self.b13[expert].double()
            out = self.w2[expert].double() @ _activate(self.activation, inner)
            out += 0 if self.b2 is None else self.b2[expert].double()
            result[token] += weights[token, slot].double() * out
        return result


def _activate(name: str, values: torch.Tensor) -> torch.Tensor:
    if name == "swigluoai":
        gate, up = values[::2].clamp(max=7.0), values[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = values.chunk(2)
    if name == "silu":
        return torch.nn.functional.silu(gate) * up
    approximate = "tanh" if name == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


def _layer(module: Any, activation: str = "silu", dtype: torch.dtype = torch.float32, bias: bool = False) -> _Layer:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    return _Layer(
        module,
        activation,
        dtype,
        w13=normal(EXPERTS, 2 * INNER, HIDDEN, scale=HIDDEN**-0.5),
        w2=normal(EXPERTS, HIDDEN, INNER, scale=INNER**-0.5),
        b13=normal(EXPERTS, 2 * INNER, scale=0.5) if bias else None,
        b2=normal(EXPERTS, HIDDEN, scale=0.5) if bias else None,
    )


def _routing(tokens: int, top_k: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    weights, ids = scores.softmax(-1).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True)).contiguous(), ids.to(torch.int32).contiguous()


def _hidden(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def _shares(ranks: int, placement: str) -> list[torch.Tensor]:
    experts = torch.arange(EXPERTS)
    if placement == "round_robin":
        return [experts[rank::ranks] for rank in range(ranks)]
    return list(experts.tensor_split(ranks))  # 3, 3 and 2 for three ranks


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swigluoai"])
def test_ranks_sum_to_the_whole(patched: Any, activation: str, bias: bool) -> None:
    layer = _layer(patched, activation, bias=bias)
    hidden, (weights, ids) = _hidden(17), _routing(17, 3)
    whole, reference = layer.run(hidden, weights, ids), layer.reference(hidden, weights, ids)
    for ranks, placement in [(2, "linear"), (3, "linear"), (3, "round_robin"), (8, "linear")]:
        parts = [layer.run(hidden, weights, ids, share) for share in _shares(ranks, placement)]
        total = torch.stack(parts).sum(0)
        torch.testing.assert_close(total, whole, rtol=0, atol=2e-6)
        torch.testing.assert_close(total.double(), reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_routing_shapes_and_dtypes(patched: Any, top_k: int, id_dtype: torch.dtype) -> None:
    layer = _layer(patched)
    for tokens in (1, 2, 40):
        hidden, (weights, ids) = _hidden(tokens), _routing(tokens, top_k)
        reference = layer.reference(hidden, weights, ids)
        parts = [layer.run(hidden, weights, ids.to(id_dtype), share) for share in _shares(3, "linear")]
        torch.testing.assert_close(torch.stack(parts).sum(0).double(), reference, rtol=0, atol=1e-5)


def test_router_weight_on_input(patched: Any) -> None:
    """With top-1 the caller has already scaled the input; the kernel must not scale again."""
    layer = _layer(patched)
    hidden, (weights, ids) = _hidden(9), _routing(9, 1)
    scale = torch.rand(9, 1) + 0.5
    scaled = hidden * scale
    reference = layer.reference(scaled, torch.ones_like(weights), ids)
    parts = [layer.run(scaled, scale, ids, share, on_input=True) for share in _shares(2, "linear")]
    torch.testing.assert_close(torch.stack(parts).sum(0).double(), reference, rtol=0, atol=1e-5)


def test_bfloat16(patched: Any) -> None:
    layer = _layer(patched, dtype=torch.bfloat16)
    hidden, (weights, ids) = _hidden(12, torch.bfloat16), _routing(12, 4)
    reference = layer.reference(hidden, weights, ids)
    whole_error = (layer.run(hidden, weights, ids).double() - reference).abs().max()
    parts = [layer.run(hidden, weights, ids, share) for share in _shares(2, "linear")]
    error = (torch.stack(parts).float().sum(0).double() - reference).abs().max()
    assert error < 2 * whole_error, (error, whole_error)


def test_a_token_does_not_depend_on_its_batch(patched: Any) -> None:
    layer = _layer(patched)
    hidden, (weights, ids) = _hidden(40), _routing(40, 4)
    share = _shares(2, "linear")[1]
    batch = layer.run(hidden, weights, ids, share)
    for token in range(0, 40, 7):
        row = slice(token, token + 1)
        assert torch.equal(batch[row], layer.run(hidden[row], weights[row], ids[row], share))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(batch[order], layer.run(hidden[order], weights[order], ids[order].contiguous(), share))


def test_tokens_without_local_experts_get_zeros(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(patched)
    ids = torch.tensor([[0, 1], [6, 7], [-1, -1], [6, -1]], dtype=torch.int32)
    weights = torch.full((4, 2), 0.5)
    output = layer.run(_hidden(4), weights, ids, torch.tensor([6, 7]))
    assert not output[[0, 2]].any() and output[[1, 3]].abs().min() > 0
    monkeypatch.setattr(patched, "cpu_fused_moe", lambda *_: pytest.fail("nothing to compute"))
    assert not layer.run(_hidden(4), weights, ids, torch.tensor([3, 4])).any()


def _record_ids(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Replace the kernel by one that only notes the expert ids it gets."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(module, "cpu_fused_moe", lambda *args: seen.append(args[7].clone()))
    return seen


def test_upstream_hands_out_global_ids(cpu_moe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect: ids beyond the local experts reach a kernel that trusts them. If not, the patch can go."""
    seen = _record_ids(cpu_moe, monkeypatch)
    _layer(cpu_moe).run(_hidden(5), *_routing(5, 2), torch.tensor([0, 1]))
    assert int(seen[0].max()) >= 2


def test_only_local_pairs_are_computed(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _record_ids(patched, monkeypatch)
    weights, ids = _routing(30, 4)
    _layer(patched).run(_hidden(30), weights, ids, torch.tensor([2, 5, 7]))
    assert seen[0].dtype == torch.int32 and seen[0].shape == (int(torch.isin(ids, torch.tensor([2, 5, 7])).sum()), 1)
    assert set(seen[0].flatten().tolist()) == {0, 1, 2}


def test_select_local_pairs() -> None:
    expert_map = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    ids = torch.tensor([[3, 0], [2, 1], [-1, 3]])
    tokens, slots, local = cpu_expert_map.select_local_pairs(ids, expert_map)
    assert (tokens.tolist(), slots.tolist(), local.tolist()) == ([0, 1, 2], [0, 1, 1], [0, 1, 0])


def test_quantized_experts_refuse(cpu_moe: Any) -> None:
    """Without the patch they accept any parallel configuration."""
    expert_parallel, tensor_parallel = SimpleNamespace(use_ep=True), SimpleNamespace(use_ep=False)
    classes = [getattr(cpu_moe, name) for name in cpu_expert_map._QUANTIZED]
    assert all(cls._supports_parallel_config(expert_parallel) for cls in classes)
    cpu_expert_map.apply()
    for cls in classes:
        assert cls._supports_parallel_config(tensor_parallel)
        with pytest.raises(NotImplementedError, match=rf"^{cls.__name__}: .*--enable-expert-parallel"):
            cls._supports_parallel_config(expert_parallel)
    assert cpu_moe.CPUUnquantizedExperts._supports_parallel_config(expert_parallel)


def test_apply_is_idempotent(patched: Any) -> None:
    function = patched.CPUUnquantizedExperts.apply
    assert cpu_expert_map.apply() is Outcome.APPLIED
    assert patched.CPUUnquantizedExperts.apply is function


def test_apply_leaves_an_upstream_repair_alone(cpu_moe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_map(out: Any, expert_map: Any) -> None: ...

    monkeypatch.setattr("vllm._custom_ops.cpu_fused_moe", with_map)
    before = cpu_moe.CPUUnquantizedExperts.apply
    assert cpu_expert_map.apply() is Outcome.NOT_NEEDED
    assert cpu_moe.CPUUnquantizedExperts.apply is before


def _other_apply(self: Any, *args: Any) -> None: ...


def test_apply_refuses_another_upstream(cpu_moe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(cpu_moe.CPUUnquantizedExperts, "apply", _other_apply)
        with pytest.raises(PatchError, match=r"^cpu_expert_map: _other_apply has changed .*vLLM \d") as error:
            cpu_expert_map.apply()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(cpu_moe.X86CPUUnquantizedExperts, "apply", _other_apply, raising=False)
    with pytest.raises(PatchError, match="X86CPUUnquantizedExperts has its own apply"):
        cpu_expert_map.apply()
