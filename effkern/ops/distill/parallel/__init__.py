"""The distillation loss over an output layer in slices of the vocabulary, one on each rank."""
