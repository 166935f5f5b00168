"""The model: a host with slots, and the life of the seeds in them."""
