"""What a preset should gain on a GPU, told from a model's configuration and from what was measured. No torch."""
