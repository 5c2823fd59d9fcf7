"""Sums of losses of residuals, and the models that know them."""
