# SPDX-License-Identifier: Apache-2.0
"""`cpu_mla_rope`: rotary embeddings on CPU of every layout of queries and keys, against float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vllm_nanocp.patches import Outcome, PatchError, cpu_mla_rope

pytest.importorskip("vllm")

TOKENS, HEADS, SIZE, POSITIONS = 20, 4, 64, 4096


@pytest.fixture
def rotary(on_cpu: None, stock: Any) -> Iterator[Any]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    with set_current_vllm_config(VllmConfig()):
        yield stock(RotaryEmbedding, "forward_cpu")


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# Name -> query and key: [tokens, heads, size] and [tokens, heads * size], slices of wider tensors too.
Made = tuple[torch.Tensor, torch.Tensor | None]
LAYOUTS: dict[str, Callable[[], Made]] = {
    "rows": lambda: (_random(TOKENS, HEADS * SIZE), _random(TOKENS, 2 * SIZE)),
    "rows of a slice": lambda: (
        _random(TOKENS, HEADS * SIZE + 96)[:, 96:],
        _random(TOKENS, 576)[:, 512:],
    ),
    "rows, no key": lambda: (_random(TOKENS, HEADS * SIZE), None),
    "heads": lambda: (_random(TOKENS, HEADS, SIZE), _random(TOKENS, HEADS, SIZE)),
    "heads, one of the key": lambda: (_random(TOKENS, HEADS, SIZE), _random(TOKENS, 1, SIZE)),
    "heads, no key": lambda: (_random(TOKENS, HEADS, SIZE), None),
    "latent attention": lambda: (
        _random(TOKENS, HEADS, 32 + SIZE)[..., 32:],
        _random(TOKENS, 512 + SIZE)[:, 512:].unsqueeze(1),
    ),
    "latent attention, one head": lambda: (
        _random(TOKENS, 1, 32 + SIZE)[..., 32:],
        _random(TOKENS, 512 + SIZE)[:, 512:].unsqueeze(1),
    ),
    "latent attention, no key": lambda: (_random(TOKENS, HEADS, 32 + SIZE)[..., 32:], None),
    "some of the heads": lambda: (
        _random(TOKENS, 2 * HEADS, SIZE)[:, :HEADS],
        _random(TOKENS, 2 * HEADS, SIZE)[:, HEADS:],
    ),
    "a batch": lambda: (_random(4, 5, HEADS * SIZE), _random(4, 5, SIZE)),
    "a batch of a slice": lambda: (_random(4, 7, HEADS * SIZE)[:, :5], _random(4, 7, SIZE)[:, 2:]),
    "elements apart": lambda: (_random(HEADS * SIZE, TOKENS).T, _random(TOKENS, 2 * SIZE)[:, ::2]),
    "no tokens": lambda: (_random(0, HEADS, SIZE), _random(0, 1, SIZE)),
}


def _positions(tokens: int) -> torch.Tensor:
    """Random ones, [tokens]; more lie behind them for a kernel that reads past the end."""
    return torch.randint(0, POSITIONS, (16 * TOKENS,), generator=torch.Generator().manual_seed(7))[:tokens]


def _exact(embedding: Any, positions: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Each pair of a head's first `rotary_dim` numbers rotated by its angle, in float64."""
    if not numbers.numel():
        return numbers.double()
    dim, positions = embedding.rotary_dim, positions.flatten()
    heads = numbers.double().reshape(positions.numel(), -1, embedding.head_size).clone()
    angles = positions.double()[:, None] * embedding.base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    first, second = (slice(0, dim // 2), slice(dim // 2, dim)) if embedding.is_neox_style else (
        slice(0, dim, 2), slice(1, dim, 2)
    )  # fmt: skip
    turned = torch.complex(heads[..., first], heads[..., second]) * turn
    heads[..., first], heads[..., second] = turned.real, turned.imag
    return heads.reshape(numbers.shape)


def _embedding(rotary: Any, neox: bool, dim: int = SIZE) -> Any:
    return rotary(SIZE, dim, POSITIONS, 10000.0, neox, torch.float32)


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max()) if got.numel() else 0.0


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("layout", ["heads", "heads, no key", "some of the heads", "elements apart"])
def test_upstream_misreads_heads(rotary: Any, layout: str, neox: bool) -> None:
    """The defect; if this fails, the patch may go. (Layouts with which upstream writes past an end are left out.)"""
    query, key = LAYOUTS[layout]()
    positions = _positions(TOKENS)
    wanted = _exact(_embedding(rotary, neox), positions, query)
    rotated, _ = _embedding(rotary, neox).forward_cpu(positions, query, key)
    assert _error(rotated, wanted) > 1


@pytest.mark.parametrize("dim", [SIZE, SIZE // 2])
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(rotary: Any, layout: str, neox: bool, dim: int) -> None:
    assert cpu_mla_rope.apply() is Outcome.APPLIED
    query, key = LAYOUTS[layout]()
    embedding = _embedding(rotary, neox, dim)
    positions = _positions(query.numel() // (HEADS * SIZE) if "one head" not in layout else TOKENS)
    if "batch" in layout:
        positions = positions.view(4, 5)
    wanted = [None if x is None else _exact(embedding, positions, x) for x in (query, key)]
    native: Any = wanted
    if query.numel():  # PyTorch's way cannot tell the heads of no tokens
        native = embedding.forward_native(positions, query.contiguous(), None if key is None else key.contiguous())
    found = embedding.forward_cpu(positions, query, key)
    for got, exact, other in zip(found, wanted, native, strict=True):
        if exact is None:
            assert got is None
        else:  # angles of float32 positions: 4,096 * 2 ** -24
            assert _error(got, exact) < 2e-3 and _error(got, other) < 1e-5


def test_neighbours_stay(rotary: Any) -> None:
    """What lies beside a slice and behind a key's end is not written."""
    cpu_mla_rope.apply()
    wide, latent = _random(TOKENS, HEADS, 32 + SIZE), _random(3 * TOKENS * HEADS, 512 + SIZE)
    before = wide.clone(), latent.clone()
    query, key = wide[..., 32:], latent[:TOKENS, 512:].unsqueeze(1)
    _embedding(rotary, False).forward_cpu(_positions(TOKENS), query, key)
    assert torch.equal(wide[..., :32], before[0][..., :32])
    assert torch.equal(latent[:, :512], before[1][:, :512]) and torch.equal(latent[TOKENS:], before[1][TOKENS:])


@pytest.mark.parametrize("layout", ["rows", "rows of a slice", "heads"])
def test_in_place_where_upstream_is(rotary: Any, layout: str) -> None:
    cpu_mla_rope.apply()
    query, key = LAYOUTS[layout]()
    found = _embedding(rotary, True).forward_cpu(_positions(TOKENS), query, key)
    assert [x.data_ptr() for x in found] == [x.data_ptr() for x in (query, key) if x is not None]


def test_positions_of_a_column(rotary: Any) -> None:
    cpu_mla_rope.apply()
    embedding, positions = _embedding(rotary, False), _positions(2 * TOKENS).view(TOKENS, 2)[:, 1]
    query, _ = LAYOUTS["heads, no key"]()
    wanted = _exact(embedding, positions, query)
    assert _error(embedding.forward_cpu(positions, query)[0], wanted) < 2e-3


def test_no_sibling_has_its_own(rotary: Any) -> None:
    """Classes that inherit the repaired method, and those that compute in PyTorch: there is no third kind."""
    import importlib
    import pkgutil

    from vllm.model_executor.layers import rotary_embedding as folder

    cpu_mla_rope.apply()
    for module in pkgutil.iter_modules(folder.__path__):
        for cls in vars(importlib.import_module(f"{folder.__name__}.{module.name}")).values():
            if inspect.isclass(cls) and hasattr(cls, "forward_cpu"):
                body = inspect.getsource(inspect.unwrap(cls.forward_cpu))
                assert cls.forward_cpu is rotary.forward_cpu or "self.forward_native(" in body, cls


def test_apply_is_idempotent(rotary: Any) -> None:
    cpu_mla_rope.apply()
    function = rotary.forward_cpu
    assert cpu_mla_rope.apply() is Outcome.APPLIED
    assert rotary.forward_cpu is function


def test_refuses_an_unknown_upstream(rotary: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Any, *args: Any) -> None:
        """Another body."""

    monkeypatch.setattr(rotary, "forward_cpu", other)
    with pytest.raises(PatchError, match="cpu_mla_rope"):
        cpu_mla_rope.apply()
