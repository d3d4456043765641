"""How much of everything a workload needs to be served within its objectives."""
