# SPDX-License-Identifier: Apache-2.0
"""`replace`: all functions of a patch or none, once, each kept as it was."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest

from vllm_nanocp.patches import Outcome, PatchError
from vllm_nanocp.patches._guard import Guarded, is_ours, replace, source_digest


class Base:
    def inherited(self) -> str:
        return "inherited"


class Owner(Base):
    def plain(self) -> str:
        return "plain"

    @staticmethod
    def static() -> str:
        return "static"

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__


NAMES = ("plain", "static", "of_class", "inherited")


@pytest.fixture
def owner(stock: Any) -> Any:
    return stock(Owner, *NAMES)


def _ours(original: Any) -> Any:
    return lambda *args: f"our {original(*args)}"


def _guarded(owner: Any, name: str, known: set[str] | None = None) -> Guarded:
    return Guarded(owner, name, known or {source_digest(getattr(owner, name))}, _ours)


def test_each_is_kept_as_it_was(owner: Any) -> None:
    """Static and class methods too; what is inherited is replaced for this class only, and nothing twice."""
    every = [_guarded(owner, name) for name in NAMES]
    for _ in range(2):
        assert replace("patches.some", *every) is Outcome.APPLIED
        assert (Owner().plain(), Owner.static(), Owner.of_class()) == ("our plain", "our static", "our Owner")
        assert (Owner().inherited(), Base().inherited()) == ("our inherited", "inherited")
    assert Owner.plain.__name__ == "plain" and is_ours(functools.wraps(Owner.plain)(lambda self: "wrapped again"))


@pytest.mark.parametrize("unknown", NAMES)
def test_all_or_none(owner: Any, unknown: str) -> None:
    every = [_guarded(owner, name, {"0" * 16} if name == unknown else None) for name in NAMES]
    with pytest.raises(PatchError, match=rf"^some: \w+\.{unknown} has changed upstream \(source digest \w+\) \(vLLM "):
        replace("patches.some", *every)
    assert not any(is_ours(getattr(owner, name)) for name in NAMES)


def _elsewhere(*args: Any) -> str:
    return "elsewhere"


def test_what_has_a_name_of_its_own_keeps_it(owner: Any) -> None:
    """Other processes find it by that name, and vLLM's own function by vLLM's."""
    known = {source_digest(owner.plain)}
    replace("patches.some", Guarded(owner, "plain", known, lambda _: _elsewhere), _guarded(owner, "inherited"))
    assert pickle.loads(pickle.dumps(owner.plain)) is _elsewhere and owner.plain.__qualname__ == "_elsewhere"
    assert owner.inherited.__qualname__ == "Base.inherited" and is_ours(owner.plain)


def test_what_is_only_relied_on_stays(owner: Any) -> None:
    relied_on = Guarded(owner, "static", {source_digest(owner.static)})
    for _ in range(2):
        assert replace("patches.some", relied_on, _guarded(owner, "plain")) is Outcome.APPLIED
        assert (Owner().plain(), Owner.static()) == ("our plain", "static")
