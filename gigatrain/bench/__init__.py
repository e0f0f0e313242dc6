"""Kernels beside plain torch and other libraries, in one run, with the conditions in every row; needs torch and rich, and no recipe."""
