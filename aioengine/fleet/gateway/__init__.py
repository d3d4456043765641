"""A gateway of the fleet: it sends requests to replicas, and follows their state."""
