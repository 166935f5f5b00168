"""The gates G0 to G5 and the tests on which they decide."""
