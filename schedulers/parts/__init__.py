"""Parts that policies are composed of: orderings, slot replacement, prefetch, preemption."""
