"""What a fast generation kept: an analytic judge of prompt accuracy, and distances from the dense result."""
