# SPDX-License-Identifier: Apache-2.0
"""Of what type a setting is. JSON has one kind of number, Python takes booleans for integers, and no annotation is
enforced: what is not looked at here ends the scheduler once it computes with it."""

from __future__ import annotations

import sys


def is_integer(value: object) -> bool:
    """Whether this is an ``int``: neither a boolean nor a float, however round."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether this is an ``int`` or ``float``, no boolean, that a float can hold: neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
