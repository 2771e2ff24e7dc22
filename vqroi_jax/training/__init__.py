"""What every training task shares: the loop, states, optimisers, checkpoints, sharding, metrics."""
