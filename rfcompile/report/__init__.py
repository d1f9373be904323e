"""What was done: reports as data, as text and as JSON."""
