"""Functions that are compiled on accelerators whatever the recipe says, since without it they would hold far too much."""

from functools import cache

import torch

compiled = cache(torch.compile)
"""Lengths after the first share one compilation: torch compiles a function a few times, then no more."""
