"""Token Graying: improves the condition of the tokens that enter a model."""
