"""The CUDA part of pipex (csrc/cuda). Built where nvcc is found; loads without a driver."""

toolkit: str
"""Version of the toolkit it was built with, such as ``13.0``."""

architectures: str
"""Targets it was built for, separated by commas."""

def device_count() -> int:
    """Number of GPUs. Raises NativeUnavailable where there is no driver or no GPU."""
