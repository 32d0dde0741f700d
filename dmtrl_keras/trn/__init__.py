"""TRN: features held to the similarity of the labels (Li et al. 2019)."""
