"""One token of each sequence through a whole stack of layers, in place, by the native kernels."""
