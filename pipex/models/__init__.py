"""Models of pipex's own: ``transformer``, which ``pipex train`` trains and the benchmarks measure."""
