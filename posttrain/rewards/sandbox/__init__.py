"""Where code that a model wrote is executed: it gets arguments, never answers; what it returns is compared outside."""
