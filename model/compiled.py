"""What is compiled on accelerators whatever the recipe says, since without it it would hold far too much, and what never is."""

from functools import cache
from typing import Any

import torch

compiled = cache(torch.compile)
"""Lengths after the first share one compilation: torch compiles a function a few times, then no more."""
uncompiled: Any = torch._disable_dynamo
"""`torch.compiler.disable` that loads the compiler (1.5 s, 130 MB) when the function is first called, not when it is defined."""
