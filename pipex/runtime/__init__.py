"""One rank walks its actions: worlds, launching, the pipeline, and the one-process reference."""
