"""MTAL: similar kernels of different tasks are shared (Feng & Chen 2021)."""
