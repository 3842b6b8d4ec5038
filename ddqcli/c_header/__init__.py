"""A finished model as one C99 header: packed weights and the kernels that read them."""
