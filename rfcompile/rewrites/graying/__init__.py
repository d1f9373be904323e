"""Token Graying: the tokens that enter a model are conditioned better."""
