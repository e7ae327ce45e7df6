"""Whether a checkpoint is whole and sound."""
