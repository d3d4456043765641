"""The policy lab: policies tried on traces in simulated time, with the engine that serves."""
