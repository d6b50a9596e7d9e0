"""What a detector's errors are, and what they cost."""
