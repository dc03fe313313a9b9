"""What the trainings of the small models share: shards, ranks, labels, optimisers and the loop itself."""
