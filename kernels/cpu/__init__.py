"""CPU ops: C++ kernels compiled on first use, and oneDNN for the linear layers."""
