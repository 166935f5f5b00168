"""One run that grows against every fixed size, at budgets over a wide range."""
