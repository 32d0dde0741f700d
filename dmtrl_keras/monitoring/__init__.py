"""What a network has learned of its tasks, and what they do to each other in training."""
