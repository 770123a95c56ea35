"""The ops in Triton: one file each, with a function of the op's name for dfq_kernels._backend."""
