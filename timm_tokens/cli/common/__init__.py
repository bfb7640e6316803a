"""What several commands need: data sets, models, checkpoints, features, processes."""
