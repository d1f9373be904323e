"""The codec as plain functions on tensors of any shape."""
from __future__ import annotations
