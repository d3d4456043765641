"""A door of the fleet: what sends requests to replicas, and knows how they are."""
