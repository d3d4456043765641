"""HTTP connections and request bodies, with bounds on what they hold."""
