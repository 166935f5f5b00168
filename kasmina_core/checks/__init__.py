"""What a blueprint must show when it registers."""
