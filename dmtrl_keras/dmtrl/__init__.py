"""DMTRL: kernels generated from shared factors (Yang & Hospedales 2017)."""
