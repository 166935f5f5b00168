"""What growth is worth: the same training FLOPs for every arm, on tasks that a laptop trains in seconds."""
