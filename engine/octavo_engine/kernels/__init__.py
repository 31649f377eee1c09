"""Triton kernels with their plain-torch twins and launchers; docs/kernels.md says what is proven of each."""
