"""What the units of a model cost that is cut by its own forward: embedding and head are priced with its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_zoo import Example
from test_profile import TICKS, _Slow, ticks  # noqa: F401
from torch import Tensor, nn

import pipex
from pipex.errors import InputError
from pipex.partition import profile_layers, split_model
from pipex.plan.layer_costs import LayerCosts
