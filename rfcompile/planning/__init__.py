"""Which bits where: scores of sites, plans under a budget, and what a plan really costs in loss."""
