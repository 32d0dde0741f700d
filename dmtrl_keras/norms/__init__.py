"""Classic multi-task penalties: norms of the stacked kernel, proximal steps, solvers."""
