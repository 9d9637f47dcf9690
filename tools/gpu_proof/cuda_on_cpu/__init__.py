"""The CUDA sources built for the CPU, with a fiber for each thread, and run in the place of the CUDA module."""
