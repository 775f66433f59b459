"""Benchmarks: pipex beside its peers, in the same run, on this machine.

    options          what the options of all have in common
    sizes            message sizes as nccl-tests writes them
    driver           interleaved measurements and their quantiles
    environment      what was measured, and on what
    report           rows, the table for people, the JSON line, floors
    torch_group      torch.distributed inside launched ranks
    torch_schedules  which of torch's schedules stands beside which of pipex's
    torch_staging    torch.distributed between GPUs over Gloo
    virtual_devices  equal shares of one GPU for the ranks that use it
    p2p              half a round trip between two processes (p2p_ends: the providers; bursts: contents and
                     comparison; beside: what messages cost a matrix product; kernels_seen: and in multiprocessors)
    step             a training step of a small pipeline
    training         a transformer that schedules train: what the next two measure
    pipeline         its step, schedule beside schedule and beside the simulator
    overlap          its communication that computing does not hide
    drop_in          torch.distributed.pipelining with and without pipex.drop_in()
    hugging_face     a training step of a Hugging Face model that pipex cuts, and torch's tracing
    backward         the split backward of one stage
    gpu              times on a GPU, and its ceilings
    products         which matrix products are measured
    gemm             the matrix products of the backward, on a GPU
    builds           any of them in two builds of pipex by turns
    gpu_check        builds, tests and measures on a machine with a GPU

A benchmark is a file with ``add_arguments`` and ``run``; ``pipex bench`` (pipex/cli/bench.py) has a line for each. How
a number is measured and what it means is said at the top of the file.
"""
