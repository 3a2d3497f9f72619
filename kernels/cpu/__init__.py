"""CPU ops: C++ kernels, from one source for every level of instructions."""
