# SPDX-License-Identifier: Apache-2.0
"""How queries reach the holders and partial results come back."""

from .base import Exchange
from .collective import CollectiveExchange

__all__ = ["CollectiveExchange", "Exchange"]
