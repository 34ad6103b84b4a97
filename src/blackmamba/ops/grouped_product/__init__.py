"""C++ products of bfloat16 rows, each with the matrix of its group; `expert_mlp` trains by them."""
