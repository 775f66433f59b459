"""Triton kernels of the backward pass, each beside its plain reference.

    input_gradient    dX = dY·W, with the gradient of the activation in its epilogue; SwiGLU's with two results
    weight_gradient   dW += dYᵀ·X over several micro-batches, or layers, in one launch, with the bias gradient
    norm              dX of RMSNorm and LayerNorm, with partial rows of the parameters' gradients, and their sum
    activations       gradients of the activations
    resources         registers, shared memory and spills of each of the ``variants``, found without a GPU
    checks            what the operands must be; needs no Triton

This package imports nothing, each of the modules but ``checks`` imports Triton: so import them when a kernel is to run.
"""
