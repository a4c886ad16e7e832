"""GitHub's API and its deliveries."""
