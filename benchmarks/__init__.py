"""What was measured, how, and the results."""
