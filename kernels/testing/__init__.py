"""Help for testing kernels without a GPU."""
