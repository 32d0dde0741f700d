"""DRN and MRN: tensor-normal priors over kernels (Long et al. 2015, 2017)."""
